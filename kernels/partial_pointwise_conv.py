"""Partial and pointwise convolution in one step, with the neighbouring BatchNorms' work.

    h = act(x * scale + shift) + residual                 act = ReLU or identity
    h[:, :c_p] = conv_kxk(h[:, :c_p])                     stride 1, odd k, zero padding of h
    y = point_weight h                                    1x1 convolution, in groups
    sums_c = sum_nhw y,   squared_sums_c = sum_nhw y^2    what the next BatchNorm needs

One family serves every convolution of a prompt block (down, three scales, up) and the fusion
block (residual: x + P(x)). Partial convolution: FasterNet (arXiv 2303.03667); the arrangement in
DFPT-KD (arXiv 2506.18244).

In: x [N, C, H, W], contiguous or channels_last, any floating dtype. Out: y [N, C_out, H, W] in
x's dtype; sums and squared_sums [C_out] in fp32 (fp64 for fp64 input). Convolutions accumulate in
fp32 or better.

MACs: N H W (k^2 c_p^2 + C_out C / groups). Bytes moved by one pass: read x (and
residual), write y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose


def partial_pointwise_conv_reference(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    relu: bool,
    residual: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    h = x
    if scale is not None:
        h = h * scale.to(h.dtype).view(1, -1, 1, 1)
    if shift is not None:
        h = h + shift.to(h.dtype).view(1, -1, 1, 1)
    if relu:
        h = h.relu()
    if residual is not None:
        h = h + residual
    if partial_weight is not None:
        h = partial_conv(h, partial_weight)
    y = F.conv2d(h, point_weight[:, :, None, None], groups=groups)
    wide = y if y.dtype == torch.float64 else y.float()
    return y, wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))


def partial_conv(x: Tensor, weight: Tensor) -> Tensor:
    """k x k convolution of the first c_p channels, the others passed on untouched.

    Args:
        x: [N, C, H, W].
        weight: [c_p, c_p, k, k], k odd.

    Returns:
        [N, C, H, W]; channels c_p and up are bit-identical to x's.
    """
    channels, kernel = weight.shape[0], weight.shape[-1]
    touched = F.conv2d(x[:, :channels], weight, padding=kernel // 2)
    return torch.cat([touched, x[:, channels:]], dim=1) if channels < x.shape[1] else touched


def partial_pointwise_conv(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    *,
    relu: bool,
    residual: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """One convolution step of a prompt or fusion block; all three outputs are differentiable.

    Args:
        x: [N, C, H, W].
        scale: Per-channel factor [C], or None for 1.
        shift: Per-channel summand [C], or None for 0.
        partial_weight: [c_p, c_p, k, k] with odd k and c_p <= C, or None.
        point_weight: [C_out, C / groups].
        relu: Whether a ReLU follows scale and shift.
        residual: [N, C, H, W] added after the activation.
        groups: Groups of the pointwise convolution; divides C and C_out.

    Returns:
        y [N, C_out, H, W]; its per-channel sum and sum of squares over N, H, W, each [C_out].

    Raises:
        ValueError: Shapes or devices do not fit together.
    """
    _check(x, scale, shift, partial_weight, point_weight, residual, groups)
    choose("partial_pointwise_conv", x)
    return partial_pointwise_conv_reference(
        x, scale, shift, partial_weight, point_weight, relu, residual, groups
    )


def _check(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    residual: Tensor | None,
    groups: int,
) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [N, C, H, W], got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name}: expected [{channels}], got {list(vector.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected {list(x.shape)}, got {list(residual.shape)}")
    if partial_weight is not None:
        shape = partial_weight.shape
        square = len(shape) == 4 and shape[0] == shape[1] and shape[2] == shape[3]
        if not (square and 0 < shape[0] <= channels and shape[2] % 2 == 1):
            raise ValueError(
                f"partial_weight: expected [c_p, c_p, k, k] with odd k and 0 < c_p <= {channels}, "
                f"got {list(shape)}"
            )
    if (
        groups < 1
        or point_weight.dim() != 2
        or channels % groups
        or point_weight.shape[0] % groups
        or point_weight.shape[1] * groups != channels
    ):
        raise ValueError(
            f"point_weight: expected [C_out, {channels} / groups] with groups={groups} dividing "
            f"both, got {list(point_weight.shape)}"
        )
    for name, tensor in (
        ("scale", scale),
        ("shift", shift),
        ("residual", residual),
        ("partial_weight", partial_weight),
        ("point_weight", point_weight),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}")
