"""Prompt and fusion blocks on the fused operators against the same modules in eager PyTorch."""

import copy

import pytest
import torch
from error_bounds import FP32, RootMeanSquares
from torch import nn

from dfptkd.engine.config import PromptConfig
from dfptkd.engine.models import prompt
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


def make_pair(config, seed=0):
    torch.manual_seed(seed)
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


def mean_errors(config, training):
    """Ours and eager's in fp32 by kind: root mean squares over three pairs.

    The largest error of one draw is a matter of luck on either side. A gradient that a later
    BatchNorm makes zero has no size of its own: gradients are relative to the largest of them.
    """
    means = RootMeanSquares()
    for seed in range(3):
        pair = make_pair(config, seed).train(training)
        exact = run(pair, torch.float64, "reference")
        largest = max(v.abs().max() for k, v in exact.items() if k.startswith("grad"))
        for name in ("native", "reference"):
            for key, value in run(pair, torch.float32, name).items():
                kind, size = "gradient", largest
                if not key.startswith("grad"):
                    size = exact[key].double().square().mean().sqrt().clamp(min=1)
                    kind = "output" if key == "y" else "buffer"
                means.add(f"{name} {kind}", value, exact[key], scale=size)
    return means


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_errors_of_the_fused_pair_are_at_most_twice_those_of_the_modules(config, training):
    means = mean_errors(config, training)
    for kind in ("output", "gradient", "buffer"):
        ours, eager = means[f"native {kind}"], means[f"reference {kind}"]
        print(f"{kind}: {ours:.1e} {eager:.1e}")
        # A variance is a difference of sums here: it loses the bits that its terms are larger by.
        least = 4 * FP32 if kind == "buffer" else 0
        assert ours <= max(2 * eager, least), kind
    pair = make_pair(config).train(training)
    ours, eager = (run(pair, torch.float32, name)["y"] for name in ("native", "reference"))
    assert not torch.equal(ours, eager), "the fused path must have run"


@pytest.mark.parametrize("slip", ["epsilon", "tap"])
def test_the_errors_tell_a_wrong_pair_apart(slip, monkeypatch):
    """Negative controls: twice the epsilon, the corner of each kernel left out."""
    right = mean_errors({}, True)
    if slip == "epsilon":
        affine = prompt.batch_norm_affine
        monkeypatch.setattr(prompt, "batch_norm_affine", lambda *a: affine(*a[:-1], 2 * a[-1]))
    else:
        convolve = prompt.partial_pointwise_conv

        def without_corner(x, scale, shift, partial, *rest, **options):
            if partial is not None:
                partial = partial.clone()
                partial[:, :, 0, 0] = 0
            return convolve(x, scale, shift, partial, *rest, **options)

        monkeypatch.setattr(prompt, "partial_pointwise_conv", without_corner)
    wrong = mean_errors({}, True)
    for kind in ("output", "gradient"):
        ratio = wrong[f"native {kind}"] / right[f"reference {kind}"]
        print(f"{slip} {kind}: {ratio:.0f}")
        assert ratio >= (10 if slip == "epsilon" else 1000)


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
