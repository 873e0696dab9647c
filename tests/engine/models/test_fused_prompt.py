"""Prompt and fusion blocks on the fused operators against the same modules in eager PyTorch."""

import copy

import pytest
import torch
from torch import nn

from dfptkd.engine.config import PromptConfig
from dfptkd.engine.models.prompt import PromptFusion
from dfptkd.kernels import backend, use_backend
from dfptkd.kernels.backend import Choices, Site, use_choices

NO_NATIVE = backend.unavailable("native")
pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

CONFIGS = [
    {},
    {"arrangement": "parallel"},
    {"prompt_norm": "none"},
    {"prompt_norm": "none", "arrangement": "parallel"},
    {"prompt_act": "none"},
    {"fusion": False},
    {"fusion_norm": "none"},
    {"fusion_groups": 4},
    {"kernels": (5,), "r2": 1.0},
]


def make_pair(config):
    torch.manual_seed(0)
    pair = PromptFusion(32, PromptConfig(**config))
    for module in pair.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return pair


def run(pair, dtype, name):
    """Output, gradients and buffers after one forward and backward pass."""
    pair = copy.deepcopy(pair).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 5, 32, 9, 7, generator=generator).to(dtype)
    x.requires_grad_()
    with use_backend(name):
        y = pair(x)
    y.backward(grad)
    gradients = {f"grad {k}": p.grad for k, p in pair.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients, **dict(pair.named_buffers())}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fused_pair_equals_the_modules(config, training):
    pair = make_pair(config).train(training)
    exact, eager, ours = (
        run(pair, dtype, name)
        for dtype, name in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, "native"),
        )
    )
    # Rounding of the whole pair; a gradient that a later BatchNorm makes zero has no scale of its
    # own.
    largest = max(v.abs().max().item() for k, v in exact.items() if k.startswith("grad"))
    for name, want in exact.items():
        error, yardstick = (
            (side[name].double() - want).abs().max().item() for side in (ours, eager)
        )
        scale = largest if name.startswith("grad") else max(1.0, want.abs().max().item())
        assert error <= max(2 * yardstick, 2e-6 * scale), name
    assert not torch.equal(ours["y"], eager["y"]), "the fused path must have run"


def test_the_observer_sees_the_prompt_of_either_path():
    pair = make_pair({}).eval()
    x = torch.randn(2, 32, 5, 5)
    seen = []
    pair.observer = lambda x, prompt: seen.append((x, prompt))
    for name in ("native", "reference"):
        with use_backend(name), torch.no_grad():
            pair(x)
    assert all(found is x for found, _ in seen)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1][1], pair.prompt(x))


def test_one_value_a_channel_is_refused_in_training_as_by_torch():
    pair = make_pair({})
    for name in ("native", "reference"):
        with use_backend(name), pytest.raises(ValueError, match="more than 1 value per channel"):
            pair(torch.randn(1, 32, 1, 1))


def test_a_pair_is_fused_where_a_measurement_or_the_caller_says_so_alone():
    pair, x = PromptFusion(16), torch.zeros(1, 16, 4, 4)
    assert pair.backend(x) == "reference"
    site = Site("prompt_pair", "cpu", torch.float32, (16, 4, 4), pair.words)
    with use_choices(Choices({site: "native"})):
        assert pair.backend(x) == "native"
        assert pair.backend(torch.zeros(7, 16, 4, 4)) == "native"  # whatever the batch
        assert pair.backend(torch.zeros(1, 16, 4, 5)) == "reference"
        assert PromptFusion(16, PromptConfig(kernels=(3, 5))).backend(x) == "reference"
        with use_backend("reference"):
            assert pair.backend(x) == "reference"
    with use_backend("native"):
        assert pair.backend(x) == "native"


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_fused_pair_compiles_as_one_graph(format):
    torch.compiler.reset()
    eager = make_pair({}).to(memory_format=format)
    compiled = copy.deepcopy(eager)
    run_compiled = torch.compile(compiled, fullgraph=True, dynamic=False)
    x, grad = torch.randn(2, 4, 32, 9, 7)
    with use_backend("native"):
        for forward in (eager, run_compiled):
            forward(x).backward(grad)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        scale = max(1.0, a.grad.abs().max().item())
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-4 * scale, msg=name)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
