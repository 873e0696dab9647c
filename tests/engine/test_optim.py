"""Optimiser groups, learning-rate schedule and weight averaging (M14, M24)."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfptkd.engine.config import OptimConfig
from dfptkd.engine.optim import (
    build_ema,
    build_optimizer,
    build_schedule,
    learning_rates,
    lr_factor,
    update_ema,
)


class Groups:
    """What build_optimizer asks of a method."""

    def __init__(self):
        self.nets = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def parameter_groups(self, optim):
        return [
            {"name": "student", "params": list(self.nets[0].parameters()), "lr": optim.lr},
            {"name": "prompt", "params": list(self.nets[1].parameters()), "lr": optim.lr / 10},
        ]


@pytest.mark.parametrize("per_epoch", [1, 7, 390, 782, 1251])
def test_M24_the_rate_falls_at_the_start_of_epochs_151_181_and_211_of_240(per_epoch):
    factor = lr_factor(OptimConfig(), 240 * per_epoch, per_epoch)
    first_steps = {epoch: (epoch - 1) * per_epoch for epoch in (151, 181, 211)}
    for power, step in enumerate(first_steps.values(), start=1):
        assert factor(step - 1) == pytest.approx(0.1 ** (power - 1))
        assert factor(step) == pytest.approx(0.1**power)
    assert factor(0) == 1.0
    assert factor(240 * per_epoch - 1) == pytest.approx(1e-3)


def test_gamma_and_milestones_are_read():
    factor = lr_factor(OptimConfig(milestones=(0.3, 0.6), gamma=0.5), 10, 1)
    assert [factor(s) for s in range(10)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert {lr_factor(OptimConfig(milestones=()), 10, 1)(s) for s in range(10)} == {1.0}


def test_cosine_ends_at_zero_and_constant_stays():
    cosine = lr_factor(OptimConfig(schedule="cosine"), 100, 10)
    assert cosine(0) == 1.0
    assert cosine(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine(50) == pytest.approx(0.5)
    assert cosine(100) == cosine(101) == 0.0
    constant = lr_factor(OptimConfig(schedule="constant"), 100, 10)
    assert {constant(s) for s in range(102)} == {1.0}


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_warm_up_multiplies_the_schedule(schedule):
    with_warmup = lr_factor(OptimConfig(schedule=schedule, warmup_epochs=2.5), 100, 4)
    without = lr_factor(OptimConfig(schedule=schedule), 100, 4)
    for step in range(100):
        assert with_warmup(step) == pytest.approx(min(1.0, (step + 1) / 10) * without(step))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["constant", "step", "cosine"]),
    st.integers(1, 500),
    st.integers(1, 50),
    st.floats(0, 3),
)
def test_the_factor_stays_within_zero_and_one(schedule, total, per_epoch, warmup):
    config = OptimConfig(schedule=schedule, warmup_epochs=warmup)
    factors = [lr_factor(config, total, per_epoch)(s) for s in range(total)]
    assert all(0 <= f <= 1 for f in factors)
    after = factors[round(warmup * per_epoch) :]
    assert after == sorted(after, reverse=True)


def test_M14_every_group_keeps_its_share_of_the_rate():
    config = OptimConfig(lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True, warmup_epochs=1.0)
    method = Groups()
    optimizer = build_optimizer(method, config)
    schedule = build_schedule(optimizer, config, total_steps=8, steps_per_epoch=2)
    factor, rates = lr_factor(config, 8, 2), []
    for step in range(8):
        rates.append([g["lr"] for g in optimizer.param_groups])
        assert rates[-1] == pytest.approx([0.1 * factor(step), 0.01 * factor(step)])
        optimizer.step()
        schedule.step()
    assert len({tuple(r) for r in rates}) > 3
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 0.01, True)


def test_the_optimiser_takes_literal_sgd_steps():
    """g = grad + wd p; v = m v + g; p = p - lr v: momentum and decay as in mdistiller's SGD."""
    method = Groups()
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.05)
    optimizer = build_optimizer(method, config)
    param = method.nets[1].weight
    expected, velocity = param.detach().double().clone(), 0.0
    for step in range(3):
        param.grad = torch.full_like(param, step + 1.0)
        velocity = 0.9 * velocity + (step + 1.0) + 0.05 * expected
        expected = expected - 0.01 * velocity
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_ema_is_the_recurrence_over_parameters_and_statistics():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = build_ema(student, 0.9)
    averages = None
    for _ in range(4):
        with torch.no_grad():
            for tensor in student.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor))
        update_ema(ema, student, 0.9, torch.tensor(True))
        now = {k: v.clone() for k, v in student.state_dict().items() if v.is_floating_point()}
        if averages is None:
            averages = now  # the first update starts the average
        else:
            averages = {k: 0.9 * averages[k] + 0.1 * v for k, v in now.items()}
    state = {k: v for k, v in ema.module.state_dict().items() if v.is_floating_point()}
    torch.testing.assert_close(state, averages)
    assert not torch.allclose(state["0.weight"], student.state_dict()["0.weight"])
    assert ema.n_averaged == 4


def test_ema_of_a_step_that_does_not_pass_keeps_its_bits():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = build_ema(student, 0.9)
    for passes in (True, False, False):
        before = {k: v.clone() for k, v in ema.state_dict().items()}
        student(torch.rand(5, 3))  # statistics and the integer counter move
        with torch.no_grad():
            student[0].weight.add_(1.0)
        update_ema(ema, student, 0.9, torch.tensor(passes))
        unchanged = [torch.equal(v, before[k]) for k, v in ema.state_dict().items()]
        assert all(unchanged) != passes


def test_ema_is_off_without_a_decay_and_leaves_the_student_alone():
    student = nn.Linear(2, 2)
    assert build_ema(student, None) is None
    before = copy.deepcopy(student.state_dict())
    update_ema(build_ema(student, 0.5), student, 0.5, torch.tensor(True))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_learning_rates_are_those_that_the_schedule_sets():
    config = OptimConfig(lr=0.1, warmup_epochs=1.0, milestones=(0.5,))
    optimizer = build_optimizer(Groups(), config)
    schedule = build_schedule(optimizer, config, total_steps=8, steps_per_epoch=2)
    for step in range(8):
        assert learning_rates(schedule, step) == [g["lr"] for g in optimizer.param_groups]
        optimizer.step()
        schedule.step()
