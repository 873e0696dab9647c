"""Execution modes on a GPU: equal results, nothing read back, nothing harmed by a capture.

Run by bench/on_gpu.sh; needs neither tyro nor a network.
"""

import dataclasses

import pytest
import torch

from dfptkd.engine.checkpoint import optimizer_tensors
from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, StepConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.methods import build_method
from dfptkd.engine.metrics import Evaluator
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
DATA_CONFIG = DataConfig(name="synthetic", num_classes=10, image_size=32, limit=512)
OPTIM = OptimConfig(lr=1e-3, schedule="cosine", weight_decay=0.01, ema_decay=0.9)
MODES = ("eager", "compile", "graph")


@pytest.fixture(scope="module")
def data():
    return load_data(DATA_CONFIG, CUDA)


def make_step(data, mode, method="dfpt", **run):
    torch.manual_seed(0)
    student = create_model("cifar:resnet8", num_classes=10)
    teacher = create_model("cifar:resnet14", num_classes=10)
    run = {"precision": "fp32", "optim": OPTIM, "global_batch": 64, **run}
    config = RunConfig(method=method, data=DATA_CONFIG, step=StepConfig(mode=mode), **run)
    made = build_method(config, student, teacher)
    made.to(CUDA, memory_format=torch.channels_last).train()
    return TrainStep(made, config, data, total_steps=100, steps_per_epoch=8, device=CUDA)


def batches(data, count=4):
    return list(train_batches(data.train, batch_size=64, seed=0, epoch=0))[:count]


def state(step):
    torch.cuda.synchronize()
    found = {**step.method.trained_state(), **optimizer_tensors(step.optimizer)}
    found["meter"] = step.meter.sums
    if step.ema is not None:
        found |= {f"ema.{k}": v for k, v in step.ema.state_dict().items()}
    return {k: v.clone() for k, v in found.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def way(step, start):
    return torch.cat([(p - s).detach().flatten() for p, s in zip(step.params, start, strict=True)])


@pytest.mark.parametrize("method", ["kd", "dfpt", "dfpt_plus"])
@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_modes_agree(data, method, mode):
    """Warm-up of the distillation and a falling learning rate included: neither is captured."""
    loss = LossConfig(warmup_epochs=0.5)
    eager, other = (make_step(data, m, method, loss=loss) for m in ("eager", mode))
    start = [p.detach().clone() for p in eager.params]
    for i, batch in enumerate(batches(data, 8)):
        eager(batch, i)
        other(batch, i)
    ours, theirs = way(other, start), way(eager, start)
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    torch.testing.assert_close(eager.meter.sums, other.meter.sums, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_modes_agree_under_adamw(data, mode):
    """Its first steps are the rate in every direction, of whatever gradient: a small eps would make
    noise of rounding."""
    optim = dataclasses.replace(OPTIM, name="adamw", eps=1e-3)
    eager, other = (make_step(data, m, optim=optim) for m in ("eager", mode))
    start = [p.detach().clone() for p in eager.params]
    for i, batch in enumerate(batches(data, 8)):
        eager(batch, i)
        other(batch, i)
    assert (way(other, start) - way(eager, start)).norm() < 0.1 * way(eager, start).norm()
    assert {int(s["step"]) for s in other.optimizer.state.values()} == {8}


@pytest.mark.parametrize(
    ("method", "name"), [("dfpt", "sgd"), ("dfpt_plus", "sgd"), ("dfpt", "adamw")]
)
def test_a_capture_moves_nothing(data, method, name):
    step = make_step(data, "graph", method, optim=dataclasses.replace(OPTIM, name=name))
    before, random = state(step), torch.cuda.get_rng_state()
    step._capture(batches(data)[0])
    assert_equal(before, state(step))
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert step.gate.skipped == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_reads_nothing_back(data, mode, precision):
    step = make_step(data, mode, precision=precision, loss=LossConfig(warmup_epochs=0.5))
    first, *rest = batches(data)
    step.choose_kernels(first)
    step(first, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, batch in enumerate(rest, start=1):
            step(batch, i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_step_changes_nothing(data, mode, name):
    """The images of a graph lie in its inputs: pixels cannot be NaN, a parameter can."""
    step = make_step(data, mode, optim=dataclasses.replace(OPTIM, name=name))
    good, bad, after = batches(data, 3)
    step(good, 0)
    weight = step.method.student.conv1.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    before = state(step)
    step(bad, 1)
    now = state(step)
    for name in before:
        torch.testing.assert_close(before[name], now[name], rtol=0, atol=0, equal_nan=True)
    assert step.gate.skipped == 1
    with torch.no_grad():
        weight.copy_(kept)
    step(after, 2)
    assert step.gate.skipped == 1
    assert not torch.equal(weight, kept)


def test_a_graph_does_the_same_twice_under_deterministic_algorithms(data):
    torch.use_deterministic_algorithms(True)
    try:
        ends = []
        for _ in range(2):
            step = make_step(data, "graph", deterministic=True)
            for i, batch in enumerate(batches(data)):
                step(batch, i)
            ends.append(state(step))
        assert_equal(*ends)
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeds_on_streams_of_their_own_end_as_alone(data):
    alone = make_step(data, "graph")
    beside = [make_step(data, "graph") for _ in range(3)]
    for step in beside:
        step.run_beside_others()
    for i, batch in enumerate(batches(data, 8)):
        alone(batch, i)
        for step in beside:
            step(batch, i)
    for step in beside:
        step.join()
    start = [p.detach().clone() for p in make_step(data, "eager").params]
    for step in beside:
        assert (way(step, start) - way(alone, start)).norm() < 0.05 * way(alone, start).norm()


def test_a_captured_evaluation_sees_the_parameters_of_today(data):
    step = make_step(data, "eager")
    options = {"batch_size": 100, "workers": 0}  # the last batch is a partial one
    plain = Evaluator(step.method, data, **options)
    captured = Evaluator(step.method, data, captured=True, **options)
    for evaluator in (plain, captured):
        evaluator.teacher()
    for i, batch in enumerate(batches(data)):
        step(batch, i)
        a, b = plain(step.ema), captured(step.ema)
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=0.5), name


def test_accumulation_and_clipping_are_captured(data):
    optim = dataclasses.replace(OPTIM, clip_grad_norm=0.5)
    eager, graph = (make_step(data, m, optim=optim, accumulate=2) for m in ("eager", "graph"))
    start = [p.detach().clone() for p in eager.params]
    for i, batch in enumerate(batches(data)):
        eager(batch, i)
        graph(batch, i)
    assert (way(graph, start) - way(eager, start)).norm() < 0.1 * way(eager, start).norm()
