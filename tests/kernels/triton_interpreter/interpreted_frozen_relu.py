"""The Triton kernels of frozen_relu, interpreted, against torch's own operations.

Run by ../test_triton_interpreter.py.
"""

import pytest
import torch
import torch.nn.functional as F

from dfptkd.kernels import frozen_relu, use_backend
from dfptkd.kernels import frozen_relu_triton as triton_relu

# Around a byte, a program of 2048 elements, and with every alignment of the size.
SHAPES = [(0,), (1,), (7,), (8,), (9,), (2047,), (2048,), (2049,), (3, 5, 7, 9), (2, 16, 12, 8)]
SPECIAL = [0.0, -0.0, 6.0, -6.0, torch.inf, -torch.inf, torch.nan]


def make_x(shape, dtype, seed=0):
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    flat = x.flatten()
    flat[: len(SPECIAL)] = torch.tensor(SPECIAL)[: len(flat)]
    x = flat.reshape(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def results(function, x, grad_y):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad(y, x, grad_y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [None, 6.0])
def test_value_and_gradient_are_torchs_own(shape, dtype, limit):
    x, grad_y = make_x(shape, dtype), make_x(shape, dtype, seed=1)
    with use_backend("triton"):
        found = results(lambda x: frozen_relu(x, limit), x, grad_y)
    y, grad_x = results(F.relu if limit is None else F.relu6, x, grad_y)
    expected = y, torch.where(x.isnan(), grad_y, grad_x)  # F.relu6 drops or passes it at random
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found[0].stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_packed_in_memory_order_lowest_first(shape):
    x = make_x(shape, torch.float32)
    _, bits = triton_relu.launch_forward(x, None)
    in_memory = x.permute(0, 2, 3, 1).flatten() if x.dim() == 4 else x.flatten()
    flags = F.pad((~(in_memory <= 0)).int(), (0, -x.numel() % 8)).reshape(-1, 8)
    assert torch.equal(bits, (flags << torch.arange(8)).sum(1).to(torch.uint8))


def test_a_gradient_in_another_layout():
    x, grad_y = make_x((2, 16, 12, 8), torch.float32), torch.randn(2, 16, 12, 8)
    with use_backend("triton"):
        found = results(frozen_relu, x, grad_y)
    torch.testing.assert_close(found, results(F.relu, x, grad_y), rtol=0, atol=0, equal_nan=True)
