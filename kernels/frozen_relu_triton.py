"""Triton backend of `frozen_relu`; the equations stand in frozen_relu.py.

A program has BYTES bytes of bits, eight elements each. It walks over memory, not over the axes of a
tensor, so one kernel serves every dense layout.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import TRITON_NAME, AotCase, aot_case, shared_alignment

# 16 elements a thread: two 16-byte loads of bf16 or fp16, four of fp32. Not tuned on a GPU yet.
_LAUNCH = {"BYTES": 256, "num_warps": 4}


@triton.jit
def _elements(count, ALIGN: tl.constexpr, BYTES: tl.constexpr):
    """Byte [BYTES], its elements [BYTES, 8] and which of them there are.

    `count` is in units of ALIGN, so that the compiler sees whole 16-byte loads in the mask.
    """
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return byte, element, element < count * ALIGN


@triton.jit(do_not_specialize=["count", "bytes"])
def forward_kernel(
    x_ptr, y_ptr, bits_ptr, count: tl.int64, bytes: tl.int64, limit,
    ALIGN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte, element, valid = _elements(count, ALIGN, BYTES)
    x = tl.load(x_ptr + element, mask=valid, other=0.0).to(tl.float32)
    stopped = x <= 0.0  # false for NaN
    y = tl.where(stopped, 0.0, x)
    if limit is not None:
        high = x >= limit
        y = tl.where(high, limit, y)
        stopped = stopped | high
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=valid)
    flags = tl.where(stopped, 0, 1) << tl.arange(0, 8)[None, :]
    tl.store(bits_ptr + byte, tl.sum(flags, 1).to(tl.uint8), mask=byte < bytes)


@triton.jit(do_not_specialize=["count", "bytes"])
def backward_kernel(
    grad_y_ptr, bits_ptr, grad_x_ptr, count: tl.int64, bytes: tl.int64,
    ALIGN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte, element, valid = _elements(count, ALIGN, BYTES)
    bits = tl.load(bits_ptr + byte, mask=byte < bytes, other=0).to(tl.int32)
    passes = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_y_ptr + element, mask=valid, other=0.0)
    tl.store(grad_x_ptr + element, tl.where(passes == 1, grad, 0.0), mask=valid)


def launch_forward(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """y like x and its bits, uint8 [ceil(numel / 8)]; no checks, no host sync.

    Args:
        x: Dense, bf16, fp16 or fp32.
        limit: Upper end, above 0; None: none.
    """
    count = x.numel()
    bits = x.new_empty(triton.cdiv(count, 8), dtype=torch.uint8)
    y = torch.empty_like(x)
    _launch(forward_kernel, x, (x, y, bits), bits, limit)
    return y, bits


def launch_backward(grad_y: Tensor, bits: Tensor) -> Tensor:
    """The gradient towards x, like grad_y, which has the memory layout of x."""
    grad_x = torch.empty_like(grad_y)
    _launch(backward_kernel, grad_y, (grad_y, bits, grad_x), bits)
    return grad_x


def _launch(
    kernel: triton.JITFunction, x: Tensor, tensors: tuple[Tensor, ...], bits: Tensor, *rest: object
) -> None:
    count = x.numel()
    if count == 0:
        return
    align = shared_alignment(count)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(len(bits), _LAUNCH["BYTES"]),)](
            *tensors, count // align, len(bits), *rest, ALIGN=align, **_LAUNCH
        )


def aot_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    """Both kernels for activations of one dtype, with and without a limit.

    Args:
        dtype: bf16, fp16 or fp32.
    """
    values = "*" + TRITON_NAME[dtype]
    types = {
        "x_ptr": values,
        "y_ptr": values,
        "grad_y_ptr": values,
        "grad_x_ptr": values,
        "bits_ptr": "*u8",
        "limit": "fp32",
    }
    for align in (16, 1):
        launch = {"ALIGN": align, **_LAUNCH}
        load = "v4.b32" if align == 16 else None
        for kernel, name, constants in (
            (forward_kernel, "relu forward", {"limit": None}),
            (forward_kernel, "relu6 forward", {}),
            (backward_kernel, "relu backward", {}),
        ):
            title = f"{name} ALIGN={align}"
            yield aot_case(title, kernel, types, launch | constants, max_registers=80, load=load)
