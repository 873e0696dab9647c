"""Convolution with a frozen weight: gradient towards the input alone.

    y = conv(x, weight) + bias              dL/dx = conv_transpose(dL/dy, weight)

The backward needs the weight and the shape of x, not x itself, so a frozen network on the way of
a gradient (the prompt path through a frozen backbone) keeps no input alive for it; autograd's own
convolution saves x even where the weight asks for no gradient.

In: x [N, C, H, W] and weight [C_out, C / groups, kh, kw] of one floating dtype, any device and
layout. MACs: N H_out W_out C_out (C / groups) kh kw, once forward and once backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

from .backend import autocast_dtype

Pair = tuple[int, int]


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
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.x_shape, ctx.options = x.shape, (stride, padding, dilation, groups)
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if is_channels_last else torch.contiguous_format
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        if grad_y.device.type != "cpu":
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
        return grad_x, None, None, None, None, None, None


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
    return _FrozenConv2d.apply(x, weight.detach(), bias, stride, padding, dilation, groups)


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2-d convolution that keeps only weight and shape for its backward.

    Args:
        x: [N, C, H, W].
        weight: [C_out, C / groups, kh, kw]; gets no gradient.
        bias: [C_out] or None; gets no gradient.
        stride, padding, dilation: One int or (rows, columns).
        groups: Groups of channels.

    Returns:
        [N, C_out, H_out, W_out], differentiable towards x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"frozen_conv2d: expected x [N, C, H, W] and weight [C_out, C / {groups}, kh, kw], "
            f"got {list(x.shape)} and {list(weight.shape)}"
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
    if not (x.requires_grad and torch.is_grad_enabled()):
        return F.conv2d(x, weight.detach(), bias, *options)
    return frozen_conv2d_reference(x, weight, bias, *options)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value
