"""Convolution with a frozen weight: gradient towards the input alone.

    y = conv(x, weight) + bias              dL/dx = conv_transpose(dL/dy, weight)

The backward needs the weight and the shape of x, not x itself, so a frozen network on the way of
a gradient (the prompt path through a frozen backbone) keeps no input alive for it; autograd's own
convolution saves x even where the weight asks for no gradient.

In: x [N, C, H, W] and weight [C_out, C / groups, kh, kw] of one floating dtype, any device and
layout. MACs: N H_out W_out C_out (C / groups) kh kw, once forward and once backward.

The native backend serves 3x3 convolutions of stride 1, padding 1, dilation 1 and one group in fp32
and channels_last, in both directions, by Winograd's F(2x2, 3x3): 16 products where the definition
has 36. Its error is at most twice that of PyTorch's own fp32 convolution and a few units in the
last place; for images under 4 x 4, where most taps of the definition meet zeros, up to 3e-6 of the
output. Its bits depend on neither the batch nor the number of threads. A NaN reaches the outputs
that it reaches by the definition and no others; so does an infinity, which may make NaN of them
where the definition keeps it. PyTorch serves all other convolutions, and these too unless measured
choices or `use_backend` ask for native: which is faster depends on the CPU and on the shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import Call, autocast_dtype, choose_at, decide_at, is_measuring

Pair = tuple[int, int]

# The 3x3 convolution of stride 1 and padding 1; `transposed` gives its input gradient: x [N, C_out,
# H, W], and y [N, C, H, W]. Compiled code sees the first; the second is csrc/frozen_conv.cpp.
_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor"
for _name in ("frozen_conv3x3", "frozen_conv3x3_native"):
    torch.library.define(f"dfptkd::{_name}", _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
_native = torch.ops.dfptkd.frozen_conv3x3_native.default


@torch.library.impl("dfptkd::frozen_conv3x3", "cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _native(x, weight, bias, transposed)  # type: ignore[no-any-return]


@torch.library.register_fake("dfptkd::frozen_conv3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(weight)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    grad_x = torch.ops.dfptkd.frozen_conv3x3(grad_y, weight, None, not ctx.transposed)
    return grad_x, None, None, None


torch.library.register_autograd(
    "dfptkd::frozen_conv3x3", _differentiate, setup_context=_setup_context
)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.backend = backend
        ctx.x_shape, ctx.options = x.shape, (stride, padding, dilation, groups)
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if is_channels_last else torch.contiguous_format
        if backend == "native":
            return _native(x, weight, bias, False)  # type: ignore[no-any-return]
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        if ctx.backend == "native":
            grad_x = _native(grad_y, weight, None, True)
        elif grad_y.device.type != "cpu":
            grad_x = torch.nn.grad.conv2d_input(ctx.x_shape, weight, grad_y, *ctx.options)
        else:
            # One element, expanded, stands in for x there, which makes a 1x1 convolution take ten
            # times as long on a CPU; memory that nobody touches costs nothing here.
            x = torch.empty(ctx.x_shape, dtype=grad_y.dtype, memory_format=ctx.layout)
            stride, padding, dilation, groups = ctx.options
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad_y, x, weight, None, stride, padding, dilation, False, (0, 0), groups,
                (True, False, False),
            )  # fmt: skip
        return grad_x, None, None, None, None, None, None, None


def frozen_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    return _FrozenConv2d.apply(
        x, weight.detach(), bias, stride, padding, dilation, groups, "reference"
    )


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    exact: bool = False,
) -> Tensor:
    """2-d convolution that keeps only weight and shape for its backward.

    Args:
        x: [N, C, H, W].
        weight: [C_out, C / groups, kh, kw], which asks for no gradient.
        bias: [C_out] or None, likewise.
        stride, padding, dilation: One int or (rows, columns).
        groups: Groups of channels.
        exact: Give the bits of PyTorch's own convolution, whatever the backend.

    Returns:
        [N, C_out, H_out, W_out], differentiable towards x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or weight or bias require grad.
    """
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"frozen_conv2d: expected x [N, C, H, W] and weight [C_out, C / {groups}, kh, kw], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    for name, constant in (("weight", weight), ("bias", bias)):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires grad, and gets none of a frozen convolution: expected it "
                "detached"
            )
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"weight: expected {x.dtype} on {x.device} like x, "
            f"got {weight.dtype} on {weight.device}"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device:
            raise ValueError(
                f"bias: expected {x.dtype} [{weight.shape[0]}] on {x.device}, "
                f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
            )
        bias = bias.detach()
    options = (_pair(stride), _pair(padding), _pair(dilation), groups)
    weight = weight.detach()
    backend = "reference" if exact else _backend(x, weight, bias, options)
    if backend == "native" and torch.compiler.is_compiling():
        return torch.ops.dfptkd.frozen_conv3x3(x, weight, bias, False)  # type: ignore[no-any-return]
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenConv2d.apply(x, weight, bias, *options, backend)  # type: ignore[no-any-return]
    if backend == "native":
        return _native(x, weight, bias, False)  # type: ignore[no-any-return]
    return F.conv2d(x, weight, bias, *options)


def _backend(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Pair, Pair, Pair, int]
) -> str:
    """The backend in force, where the native kernel computes this convolution; else the
    reference."""
    if (
        weight.shape[2:] != (3, 3)
        or options != ((1, 1), (1, 1), (1, 1), 1)
        or not x.is_contiguous(memory_format=torch.channels_last)
        # Dispatch modes look into a call, to count its FLOPs for one: they see the reference.
        or (is_in_torch_dispatch_mode() and not torch.compiler.is_compiling())
    ):
        return "reference"
    has_gradient = x.requires_grad and torch.is_grad_enabled()
    words: tuple[str | int, ...] = ("bias",) * (bias is not None) + ("gradient",) * has_gradient
    at = ("frozen_conv2d", x, x.shape[1:], (weight.shape[0], *words))
    if is_measuring():
        return decide_at(Call(_conv3x3, (x, weight, bias)), *at)
    return choose_at(*at)


def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return frozen_conv2d(x, weight, bias, padding=1)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value
