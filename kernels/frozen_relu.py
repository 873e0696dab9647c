"""ReLU inside a frozen network: one bit an element is kept for the backward, not the activation.

    y = min(max(x, 0), limit)               dL/dx = dL/dy where 0 < x < limit, else 0

`limit` 6 is ReLU6, without one it is ReLU; values and gradients are those of torch's own, NaN
passes both ways. The bits are packed eight to a byte in memory order, the first in the lowest bit.
The reference keeps a bool an element. So does compiled code on CUDA: Inductor works it into the
kernels before and behind it, where an operator of its own would be a launch of its own and, with
the bias, the normalisation or the sum before it, another pass over the activation each way.

In: x of any shape, bf16, fp16, fp32 or fp64. Bytes moved, forward and backward alike: a read and a
write of x, 1/8 an element for the bits. Unsupported: double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import Call, are_choices_in_force, choose_at, decide_at, forced_backend, is_measuring

# The kernels, without autograd: csrc/frozen_relu.cpp implements them for CPU, Triton for CUDA.
# Tensors are dense, grad_y has the memory layout of x. bits: uint8 [ceil(numel / 8)].
torch.library.define(
    "dfptkd::frozen_relu_forward",
    "(Tensor x, float? limit) -> (Tensor y, Tensor bits)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "dfptkd::frozen_relu_backward",
    "(Tensor grad_y, Tensor bits) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# The differentiable one, which compiled code and dispatch modes see.
torch.library.define(
    "dfptkd::frozen_relu",
    "(Tensor x, float? limit) -> (Tensor y, Tensor bits)",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward = torch.ops.dfptkd.frozen_relu_forward.default
_backward = torch.ops.dfptkd.frozen_relu_backward.default


@torch.library.register_fake("dfptkd::frozen_relu_forward")
@torch.library.register_fake("dfptkd::frozen_relu")
def _(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("dfptkd::frozen_relu_backward")
def _(grad_y: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(grad_y)


@torch.library.impl("dfptkd::frozen_relu", ("cpu", "cuda"))
def _(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    return _forward(x, limit)  # type: ignore[no-any-return]


def _triton_forward(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    from .frozen_relu_triton import launch_forward

    return launch_forward(x, limit)


def _triton_backward(grad_y: Tensor, bits: Tensor) -> Tensor:
    from .frozen_relu_triton import launch_backward

    return launch_backward(grad_y, bits)


torch.library.impl("dfptkd::frozen_relu_forward", "cuda", _triton_forward)
torch.library.impl("dfptkd::frozen_relu_backward", "cuda", _triton_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, bits = output
    ctx.layout = _layout(y)
    ctx.save_for_backward(bits)
    ctx.mark_non_differentiable(bits)


@once_differentiable
def _differentiate(ctx: Any, grad_y: Tensor, _: None) -> tuple[Tensor, None]:
    (bits,) = ctx.saved_tensors
    return _backward(grad_y.contiguous(memory_format=ctx.layout), bits), None


torch.library.register_autograd("dfptkd::frozen_relu", _differentiate, setup_context=_setup_context)


def _reference_forward(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    stopped = x <= 0 if limit is None else (x <= 0) | (x >= limit)
    return _relu(x, limit), ~stopped


def _reference_backward(grad_y: Tensor, passes: Tensor) -> Tensor:
    return torch.where(passes, grad_y, 0)


_KERNELS: dict[str, tuple[Callable, Callable]] = {
    "reference": (_reference_forward, _reference_backward),
    "native": (_forward, _backward),
    "triton": (_triton_forward, _triton_backward),
}


class _FrozenReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float | None, backend: str) -> Tensor:
        y, kept = _KERNELS[backend][0](x, limit)
        ctx.backend, ctx.layout = backend, _layout(x)
        ctx.save_for_backward(kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=ctx.layout)
        return _KERNELS[ctx.backend][1](grad_y, kept), None, None


def frozen_relu(x: Tensor, limit: float | None = None) -> Tensor:
    """ReLU, or a clamp to [0, limit], that keeps one bit an element for its backward.

    Args:
        x: Any shape. Contiguous and channels_last memory is used as it lies, any other is copied
            first; the result has the same layout.
        limit: Upper end above 0, a value of x's dtype; None: none.

    Returns:
        Same shape and dtype, differentiable towards x. Where x needs no gradient, torch's own
        operation, and nothing is kept.

    Raises:
        ValueError: x is not floating point, or limit is not above 0.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a number above 0, got {limit}")
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _relu(x, limit)
    x = x.contiguous(memory_format=_layout(x))
    limits = () if limit is None else (float(limit),)
    at = ("frozen_relu", x, x.shape[1:], limits)
    if is_measuring():
        backend = decide_at(Call(lambda x: frozen_relu(x, limit), (x,)), *at)
    else:
        backend = choose_at(*at)
    is_told = forced_backend() is not None or are_choices_in_force()
    if backend == "triton" and torch.compiler.is_compiling() and not is_told:
        backend = "reference"
    if backend != "reference" and (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()):
        return torch.ops.dfptkd.frozen_relu(x, limit)[0]
    # What torch.library adds in Python takes longer than a small activation itself.
    return _FrozenReLU.apply(x, limit, backend)  # type: ignore[no-any-return]


def _relu(x: Tensor, limit: float | None) -> Tensor:
    return F.relu(x) if limit is None else x.clamp(0, limit)


def _layout(x: Tensor) -> torch.memory_format:
    """Channels_last where x is that and not contiguous, as it can be both; else contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
