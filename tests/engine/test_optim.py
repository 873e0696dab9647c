"""Optimisers by name, their groups and state, learning rates and weight averaging (M14, M24)."""

import copy
import dataclasses
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfptkd.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.errors import DataError, UsageError
from dfptkd.engine.optim import (
    build_ema,
    build_optimizer,
    build_schedule,
    learning_rates,
    lr_factor,
    rates_to_device,
    rates_to_numbers,
    skips_by_itself,
    update_ema,
)
from dfptkd.engine.step import choose_mode
from dfptkd.engine.teacher import teacher_run
from dfptkd.engine.train import run


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
    optimizer = build_optimizer(method, config, 64)
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
    optimizer = build_optimizer(method, config, 64)
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
    optimizer = build_optimizer(Groups(), config, 64)
    schedule = build_schedule(optimizer, config, total_steps=8, steps_per_epoch=2)
    for step in range(8):
        assert learning_rates(schedule, step) == [g["lr"] for g in optimizer.param_groups]
        optimizer.step()
        schedule.step()


# Optimisers by name -------------------------------------------------------------------------------


def walk(optimizer, steps=3, seed=0):
    """Steps along random gradients, the same for every optimiser of the same parameters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def test_adamw_takes_literal_adamw_steps():
    """Decay off the parameter, moments of the gradient alone, both corrected for their start."""
    method = Groups()
    betas, eps, decay = (0.8, 0.95), 1e-3, 0.1
    config = OptimConfig(name="adamw", lr=0.1, betas=betas, eps=eps, weight_decay=decay)
    optimizer = build_optimizer(method, config, 64)
    param = method.nets[1].weight
    expected, m, v = param.detach().double().clone(), 0.0, 0.0
    for step in range(1, 4):
        grad = torch.full_like(expected, (-2.0) ** step)
        param.grad = grad.float()
        m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
        corrected = (v / (1 - betas[1] ** step)).sqrt() + eps
        expected = expected * (1 - 0.01 * decay) - 0.01 * m / (1 - betas[0] ** step) / corrected
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_that_is_there_from_the_start_changes_no_bit(name):
    torch.manual_seed(0)
    ours, bare = Groups(), Groups()
    for a, b in zip(ours.nets, bare.nets, strict=True):
        b.load_state_dict(a.state_dict())
    config = OptimConfig(name=name, lr=0.1)
    groups = bare.parameter_groups(config)
    plain = (
        torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, fused=True)
        if name == "sgd"
        else torch.optim.AdamW(groups, weight_decay=5e-4, fused=True)
    )
    walk(build_optimizer(ours, config, 64))
    walk(plain)
    for a, b in zip(ours.nets, bare.nets, strict=True):
        assert all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize(
    ("batch", "lr_batch", "factor"), [(512, 256, 2), (64, 256, 0.25), (64, None, 1)]
)
def test_rates_follow_the_batch_where_they_are_said_to(batch, lr_batch, factor):
    config = OptimConfig(lr=0.1, lr_batch=lr_batch, schedule="constant")
    optimizer = build_optimizer(Groups(), config, batch)
    expected = pytest.approx([0.1 * factor, 0.01 * factor])
    assert [g["lr"] for g in optimizer.param_groups] == expected
    schedule = build_schedule(optimizer, config, 8, 2)
    assert learning_rates(schedule, 3) == expected  # what a run logs


def test_a_teacher_keeps_the_rate_of_its_own_batch():
    optim = OptimConfig(lr=0.1, lr_batch=256)
    config = RunConfig(
        global_batch=1024, optim=optim, teacher=TeacherConfig(lr=0.05, global_batch=64)
    )
    made = teacher_run(config)
    rates = [
        build_optimizer(Groups(), made.optim, batch).param_groups[0]["lr"]
        for batch in (made.global_batch, 128)  # and follows the batch from there
    ]
    assert rates == pytest.approx([0.05, 0.1])
    plain = teacher_run(dataclasses.replace(config, optim=OptimConfig(lr=0.1)))
    assert (plain.optim.lr, plain.optim.lr_batch) == (0.05, None)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_may_go_without_decay(name):
    """With no gradient at all, decay alone moves a parameter."""
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    for chosen in (config, dataclasses.replace(config, decay_norm_and_bias=True)):
        method = Groups()
        optimizer = build_optimizer(method, chosen, 64)
        split = not chosen.decay_norm_and_bias
        names = [g["name"] for g in optimizer.param_groups]
        assert names == (["student"] * 2 + ["prompt"] * 2 if split else ["student", "prompt"])
        before = [p.detach().clone() for net in method.nets for p in net.parameters()]
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        after = [p for net in method.nets for p in net.parameters()]
        moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert moved == [True, not split, True, not split]  # weight, bias, weight, bias


def test_the_split_makes_no_empty_group():
    class Biases(Groups):
        def parameter_groups(self, optim):
            return [{"name": "student", "params": [self.nets[0].bias], "lr": optim.lr}]

    optimizer = build_optimizer(Biases(), OptimConfig(decay_norm_and_bias=False), 64)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1]


# State in checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("split", [True, False])
def test_restored_state_is_the_saved_one_bit_by_bit(name, split):
    config = OptimConfig(name=name, lr=0.1, decay_norm_and_bias=split)
    torch.manual_seed(0)
    ours, other = Groups(), Groups()
    saved = walk(build_optimizer(ours, config, 64))
    tensors = {k: v.clone() for k, v in optimizer_tensors(saved).items()}
    per_param = {"sgd": 1, "adamw": 3}[name]
    assert len(tensors) == 4 * per_param
    if name == "adamw":
        assert tensors["optimizer.0.step"].shape == ()
        assert tensors["optimizer.0.step"] == 3
    for a, b in zip(ours.nets, other.nets, strict=True):
        b.load_state_dict(a.state_dict())
    restored = build_optimizer(other, config, 64)
    restore_optimizer(restored, {**tensors, "meter": torch.zeros(3)})
    walk(saved, seed=1)
    walk(restored, seed=1)
    for a, b in zip(ours.nets, other.nets, strict=True):
        assert all(map(torch.equal, a.parameters(), b.parameters()))
    after = optimizer_tensors(restored)
    assert all(torch.equal(v, after[k]) for k, v in optimizer_tensors(saved).items())


@pytest.mark.parametrize(("there", "here"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimisers_state_is_refused_in_one_line(there, here):
    made = {
        name: build_optimizer(Groups(), OptimConfig(name=name), 64) for name in ("sgd", "adamw")
    }
    tensors = optimizer_tensors(made[there])
    before = {k: v.clone() for k, v in optimizer_tensors(made[here]).items()}
    with pytest.raises(DataError, match=r"optimizer\.0\..*another optimiser") as caught:
        restore_optimizer(made[here], tensors)
    assert "\n" not in str(caught.value)
    now = optimizer_tensors(made[here])
    assert all(torch.equal(v, now[k]) for k, v in before.items())


def test_state_of_other_shapes_is_refused():
    optimizer = build_optimizer(Groups(), OptimConfig(), 64)
    tensors = {k: torch.zeros(7) for k in optimizer_tensors(optimizer)}
    with pytest.raises(
        DataError, match=r"momentum_buffer in the checkpoint: \[7\], expected \[2, 2\]"
    ):
        restore_optimizer(optimizer, tensors)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_that_goes_on_ends_where_one_in_a_piece_does(name, tmp_path):
    """And one that goes on under another optimiser is refused."""
    config = RunConfig(
        method="ce", student="cifar:resnet8_s2", epochs=2, global_batch=16, device="cpu",
        data=DataConfig(name="synthetic", num_classes=4, image_size=16, limit=48),
        optim=OptimConfig(name=name, lr=0.01), out=str(tmp_path / "whole"),
    )  # fmt: skip
    run(config)
    parts = dataclasses.replace(config, out=str(tmp_path / "parts"))
    run(dataclasses.replace(parts, max_steps=2))
    other = dataclasses.replace(config.optim, name="adamw" if name == "sgd" else "sgd")
    with pytest.raises(DataError, match=f"optim.name: {name} there, {other.name} here"):
        run(dataclasses.replace(parts, optim=other))
    run(parts)
    whole, resumed = (
        load_checkpoint(checkpoints(tmp_path / end / "checkpoints")[0]).tensors
        for end in ("whole", "parts")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


# apex ---------------------------------------------------------------------------------------------


class StandInSGD(torch.optim.SGD):
    """What our adapter relies on of apex's FusedSGD, without its kernel."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    def zero_grad(self):  # takes no argument there
        super().zero_grad()

    def step(self, closure=None):
        vars(self).pop("found_inf", None)  # torch's knows it, apex's does not
        if not self._dummy_overflow_buf:
            super().step()


class StandInLamb(torch.optim.Optimizer):
    """Likewise of FusedMixedPrecisionLamb: its group state, and its loss of the groups' rates."""

    def __init__(self, groups, *, lr, betas, eps, weight_decay, max_grad_norm):
        defaults = {"lr": torch.tensor(lr), "step": torch.zeros(1, dtype=torch.int),
                    "betas": betas, "eps": eps, "weight_decay": weight_decay}  # fmt: skip
        super().__init__(groups, defaults)
        self.max_grad_norm = max_grad_norm
        self._step_supports_amp_scaling = True

    def add_param_group(self, group):
        super().add_param_group(group)
        for name in ("lr", "step"):
            self.param_groups[-1][name] = self.defaults[name].clone()

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        (found,) = grad_scaler._check_inf_per_device(self).values()
        assert found.shape == grad_scaler._get_scale_async().shape == (1,)
        for group in self.param_groups:
            group["step"] += (found != 1).int()
            for p in group["params"]:
                p -= group["lr"] * p.grad * (1 - found)


@pytest.fixture
def stand_in_apex(monkeypatch):
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedMixedPrecisionLamb = StandInSGD, StandInLamb
    for name, module in {
        "amp_C": types.ModuleType("amp_C"),
        "apex": types.ModuleType("apex"),
        "apex.optimizers": optimizers,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("dfptkd.engine.optim.check_optimizer", lambda *_: None)


@pytest.mark.parametrize("name", ["apex-sgd", "apex-lamb"])
def test_apex_behind_our_adapter_skips_restores_and_keeps_rates(stand_in_apex, name):
    method = Groups()
    config = OptimConfig(name=name, lr=0.5, schedule="constant")
    optimizer = build_optimizer(method, config, 64)
    assert skips_by_itself(optimizer)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    schedule = build_schedule(optimizer, config, 8, 2)
    assert learning_rates(schedule, 0) == [0.5, 0.05]  # numbers, whatever the groups hold
    if name == "apex-lamb":
        assert optimizer.max_grad_norm == math.inf
        assert optimizer_tensors(optimizer)["optimizer.group1.step"].shape == (1,)
        rates_to_numbers(optimizer)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    optimizer.zero_grad(set_to_none=True)
    walk(optimizer, 1)  # found_inf not set yet
    for skip in (True, False):
        state = [*optimizer_tensors(optimizer).values()]
        state += [p for net in method.nets for p in net.parameters()]
        before = [t.detach().clone() for t in state]
        optimizer.found_inf = torch.tensor(float(skip))
        walk(optimizer, 1)
        assert all(map(torch.equal, before, state)) == skip
    other = build_optimizer(Groups(), config, 64)
    restore_optimizer(other, optimizer_tensors(optimizer))
    pairs = zip(
        optimizer_tensors(other).values(), optimizer_tensors(optimizer).values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_apex_that_cannot_be_had_is_said_in_one_line(monkeypatch):
    config = RunConfig(optim=OptimConfig(name="apex-sgd"))
    with pytest.raises(UsageError, match="need a CUDA device, this is cpu: expected sgd or adamw"):
        choose_mode(config, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UsageError) as caught:
        choose_mode(config, torch.device("cuda"))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("github.com/NVIDIA/apex", "APEX_CUDA_EXT=1 pip install", "PyPI's apex is another"):
        assert part in message


def test_a_graph_takes_the_rates_that_it_can_read_anew(monkeypatch):
    monkeypatch.setattr("dfptkd.engine.step.check_optimizer", lambda *_: None)
    modes = {
        name: choose_mode(RunConfig(optim=OptimConfig(name=name)), torch.device("cuda"))[0]
        for name in ("sgd", "adamw", "apex-sgd", "apex-lamb")
    }
    assert modes == {"sgd": "graph", "adamw": "graph", "apex-sgd": "compile", "apex-lamb": "graph"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_on_the_device_and_back(name):
    optimizer = build_optimizer(Groups(), OptimConfig(name=name, lr=0.25), 64)
    rates_to_device(optimizer, torch.device("cpu"))
    assert all(isinstance(g["lr"], torch.Tensor) for g in optimizer.param_groups)
    assert {g.get("capturable") for g in optimizer.param_groups} == {
        True if name == "adamw" else None
    }
    rates_to_numbers(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, pytest.approx(0.025)]
    assert not any(g.get("capturable") for g in optimizer.param_groups)
