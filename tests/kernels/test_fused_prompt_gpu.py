"""The Triton prompt path on a GPU: numerics, determinism, no host sync, CUDA graphs.

Run by bench/on_gpu.sh; needs neither tyro nor a network.
"""

import copy

import pytest
import torch

from dfptkd.engine.models import PromptFusion
from dfptkd.kernels import partial_pointwise_conv, use_backend, which_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = [
    # batch, channels, size, c_p, kernel, C_out, groups, residual
    (3, 20, (5, 7), 5, 3, 33, 1, True),
    (1, 1, (1, 1), 1, 3, 1, 1, False),
    (17, 64, (14, 14), 16, 7, 64, 1, True),
    (2, 33, (33, 9), 0, 1, 64, 1, False),
    (8, 128, (7, 7), 128, 5, 32, 1, False),
    (4, 64, (56, 56), 4, 5, 16, 1, False),
    (2, 96, (1, 33), 6, 3, 48, 4, True),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """fp32 as fp32: the yardstick is eager's rounding, not TF32's."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


def make_inputs(case):
    batch, channels, size, touched, kernel, out, groups, has_residual = case
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).cuda()

    return {
        "x": randn(batch, channels, *size),
        "scale": 1 + 0.3 * randn(channels),
        "shift": 0.3 * randn(channels),
        "partial_weight": randn(touched, touched, kernel, kernel) / 4 if touched else None,
        "point_weight": randn(out, channels // groups) / 4,
        "residual": randn(batch, channels, *size) if has_residual else None,
    }


def run(case, dtype, name, *, rounded_to):
    """Outputs and gradients in `dtype`, from numbers that `rounded_to` can hold."""
    tensors = {
        key: None
        if value is None
        else (value if value.dim() == 1 else value.to(rounded_to))
        .to(torch.float32 if value.dim() == 1 and dtype != torch.float64 else dtype)
        .requires_grad_()
        for key, value in make_inputs(case).items()
    }
    with use_backend(name):
        outputs = partial_pointwise_conv(**tensors, relu=True, groups=case[6])
    generator = torch.Generator(device="cuda").manual_seed(1)
    upstream = [
        torch.randn(o.shape, generator=generator, device="cuda").to(rounded_to).to(o.dtype) / 4
        for o in outputs
    ]
    leaves = [t for t in tensors.values() if t is not None]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case, dtype):
    """As root mean squares, and a few units where that is exact by luck."""
    exact = run(case, torch.float64, "reference", rounded_to=dtype)
    eager = run(case, dtype, "reference", rounded_to=dtype)
    ours = run(case, dtype, "triton", rounded_to=dtype)
    magnitudes = [v.abs().max().item() for v in exact]
    magnitudes[1] = exact[0].abs().sum((0, 2, 3)).max().item()
    magnitudes[2] = exact[2].max().item()
    for found, yardstick, want, size in zip(ours, eager, exact, magnitudes, strict=True):
        error, allowed = (
            (side.double() - want).square().mean().sqrt().item() for side in (found, yardstick)
        )
        assert error <= max(2 * allowed, 4 * torch.finfo(dtype).eps * size)


def step(pair, x, grad):
    """Output and gradients of a training step in bf16."""
    pair.zero_grad()
    x = x.detach().requires_grad_()
    with use_backend("triton"), torch.autocast("cuda", torch.bfloat16):
        y = pair(x)
    y.backward(grad.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in pair.parameters())]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return PromptFusion(64).cuda()


@pytest.fixture
def images():
    return torch.randn(2, 8, 64, 14, 14, device="cuda").unbind()


def test_two_launches_are_bit_equal(pair, images):
    first = [t.clone() for t in step(copy.deepcopy(pair), *images)]
    for a, b in zip(first, step(copy.deepcopy(pair), *images), strict=True):
        assert torch.equal(a, b)


def test_no_host_sync(pair, images):
    step(pair, *images)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pair, *images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_it(pair, images):
    twin = copy.deepcopy(pair)
    static = [t.clone() for t in images]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(pair, *static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(pair, *static)
    for held, fresh in zip(static, images, strict=True):
        held.copy_(fresh * 0.5)
    graph.replay()
    for a, b in zip(captured, step(twin, *(t * 0.5 for t in images)), strict=True):
        assert torch.equal(a, b)


def test_it_stays_eager_until_a_measurement_or_the_caller_says_otherwise(pair, images):
    assert which_backend("partial_pointwise_conv", images[0]) == "triton"
    assert pair.backend(images[0]) == "reference"
    with use_backend("triton"):
        assert pair.backend(images[0]) == "triton"
