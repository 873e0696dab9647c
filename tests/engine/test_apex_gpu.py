"""apex's optimizers behind our adapter, on a GPU: what they compute, and that they skip.

Run by bench/on_gpu.sh optim; needs NVIDIA apex with its CUDA extension.
"""

import importlib.util

import pytest
import torch
from torch import nn

from dfptkd.engine.checkpoint import optimizer_tensors, restore_optimizer
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, StepConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.methods import build_method
from dfptkd.engine.models import create_model
from dfptkd.engine.optim import build_optimizer
from dfptkd.engine.step import TrainStep

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("amp_C") is None,
        reason="needs NVIDIA apex with its CUDA extension amp_C",
    ),
]

CUDA = torch.device("cuda")
STEPS = 20
APEX = ("apex-sgd", "apex-lamb")


class Groups:
    """What build_optimizer asks of a method: two groups, one of another rate, odd sizes too."""

    def __init__(self):
        torch.manual_seed(0)
        self.nets = [
            nn.Sequential(nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Conv2d(17, 64, 3)),
            nn.Linear(129, 65),
        ]
        for net in self.nets:
            net.to(CUDA, memory_format=torch.channels_last)

    def parameter_groups(self, optim):
        return [
            {"name": "student", "params": list(self.nets[0].parameters()), "lr": optim.lr},
            {"name": "prompt", "params": list(self.nets[1].parameters()), "lr": optim.lr / 10},
        ]

    def values(self):
        return [p for net in self.nets for p in net.parameters()]


def gradients(params, step):
    generator = torch.Generator(CUDA).manual_seed(step)
    for p in params:
        p.grad = torch.empty_like(p).normal_(generator=generator)


def walk(optimizer, params, first=0, count=STEPS):
    for step in range(first, first + count):
        optimizer.zero_grad(set_to_none=True)
        gradients(params, step)
        optimizer.found_inf = torch.zeros((), device=CUDA)
        optimizer.step()


def make(name, **options):
    method = Groups()
    config = OptimConfig(name=name, lr=0.05, weight_decay=0.01, **options)
    return method, build_optimizer(method, config, 64)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_apex_sgd_is_torch_sgd(momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("Nesterov needs momentum")
    options = {"momentum": momentum, "nesterov": nesterov, "decay_norm_and_bias": False}
    ours, theirs = make("apex-sgd", **options), make("sgd", **options)
    start = [p.detach().clone() for p in ours[0].values()]
    for method, optimizer in (ours, theirs):
        walk(optimizer, method.values())
    for a, b, s in zip(ours[0].values(), theirs[0].values(), start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (a - s).abs().max() > 1e-3


def plain_lamb(params, rates, *, betas, eps, decay, steps):
    """LAMB in fp64 (arXiv 1904.00962), its moments corrected for their start."""
    values = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in values]
    for step in range(1, steps + 1):
        gradients(params, step - 1)
        for i, (p, lr) in enumerate(zip(params, rates, strict=True)):
            grad, (m, v) = p.grad.double(), moments[i]
            m.mul_(betas[0]).add_((1 - betas[0]) * grad)
            v.mul_(betas[1]).add_((1 - betas[1]) * grad**2)
            root = (v / (1 - betas[1] ** step)).sqrt() + eps
            update = m / (1 - betas[0] ** step) / root + decay * values[i]
            length, norm = values[i].norm(), update.norm()
            trust = length / norm if length > 0 and norm > 0 else 1.0
            values[i] = values[i] - lr * trust * update
    return values


def test_apex_lamb_is_lamb():
    method, optimizer = make("apex-lamb", betas=(0.8, 0.95), eps=1e-6)
    params = method.values()
    rates = [g["lr"].item() for g in optimizer.param_groups for _ in g["params"]]
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.005)
    expected = plain_lamb(params, rates, betas=(0.8, 0.95), eps=1e-6, decay=0.01, steps=STEPS)
    walk(optimizer, params)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", APEX)
def test_a_saved_state_goes_on_with_the_same_bits(name):
    method, optimizer = make(name)
    walk(optimizer, method.values(), 0, 3)
    other, resumed = make(name)
    for a, b in zip(other.values(), method.values(), strict=True):
        a.data.copy_(b.data)
    restore_optimizer(resumed, {k: v.cpu() for k, v in optimizer_tensors(optimizer).items()})
    walk(optimizer, method.values(), 3, 3)
    walk(resumed, other.values(), 3, 3)
    assert all(map(torch.equal, method.values(), other.values()))


def make_step(name, mode):
    data_config = DataConfig(name="synthetic", num_classes=10, image_size=32, limit=512)
    data = load_data(data_config, CUDA)
    torch.manual_seed(0)
    student, teacher = (create_model(f"cifar:resnet{n}", num_classes=10) for n in (8, 14))
    config = RunConfig(
        method="dfpt", data=data_config, step=StepConfig(mode=mode), precision="fp32",
        optim=OptimConfig(name=name, lr=1e-3, schedule="cosine", decay_norm_and_bias=False),
    )  # fmt: skip
    made = build_method(config, student, teacher)
    made.to(CUDA, memory_format=torch.channels_last).train()
    step = TrainStep(made, config, data, total_steps=100, steps_per_epoch=8, device=CUDA)
    return step, list(train_batches(data.train, batch_size=64, seed=0, epoch=0))


def state(step):
    torch.cuda.synchronize()
    found = {**step.method.trained_state(), **optimizer_tensors(step.optimizer)}
    return {k: v.detach().clone() for k, v in found.items()}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("name", "mode"), [("apex-sgd", "eager"), ("apex-lamb", "eager"), ("apex-lamb", "graph")]
)
def test_a_bad_step_changes_nothing(name, mode, first):
    step, (good, bad, after, *_) = make_step(name, mode)
    if not first:
        step(good, 0)
    weight = step.method.student.conv1.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    before = state(step)
    step(bad, 1)
    now = state(step)
    for key, value in before.items():
        torch.testing.assert_close(value, now[key], rtol=0, atol=0, equal_nan=True)
    assert step.gate.skipped == 1
    with torch.no_grad():
        weight.copy_(kept)
    step(after, 2)
    assert step.gate.skipped == 1
    assert not torch.equal(weight, kept)
    assert all(v.isfinite().all() for v in state(step).values())


def test_a_graph_of_lamb_follows_eager_steps_and_its_falling_rate():
    walks = []
    for mode in ("eager", "graph"):
        step, batches = make_step("apex-lamb", mode)
        start = [p.detach().clone() for p in step.params]
        for i, batch in enumerate(batches):
            step(batch, i)
        assert {int(g["step"]) for g in step.optimizer.param_groups} == {len(batches)}
        ends = zip(step.params, start, strict=True)
        walks.append(torch.cat([(p - s).detach().flatten() for p, s in ends]))
    assert (walks[0] - walks[1]).norm() < 0.1 * walks[0].norm()
