"""Error bounds of partial_pointwise_conv, its backward and the BatchNorm around it.

The equations are those of kernels/partial_pointwise_conv.py and kernels/batch_norm.py, followed as
error_bounds.py says. Sums are those of the y that is returned, and the backward reads that y: where
the caller gives it, an error of y counts for y alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from error_bounds import Computed, concatenate, exact, products
from torch import Tensor

PIXELS = (0, 2, 3)


def partial_pointwise_conv_bounds(
    tensors: dict[str, Tensor | None],
    grads: list[Tensor | None],
    returned_y: Tensor,
    *,
    relu: bool,
    groups: int,
    dtype: torch.dtype = torch.float32,
    is_truncated: bool = False,
) -> dict[str, Computed]:
    """Outputs and gradients by name.

    Args:
        tensors: x, scale, shift, partial_weight, point_weight and residual, or None.
        grads: Upstream gradients of y, sums and squared_sums; None is 0.
        returned_y: y as the implementation under test gave it.
        relu, groups: As in the operator.
        dtype: What activations and their gradients are stored in; sums run in fp32.
        is_truncated: Whether storing cuts off instead of rounding.
    """
    given = {name: None if t is None else exact(t) for name, t in tensors.items()}
    x, point_weight = given["x"], given["point_weight"]
    partial_weight, residual = given["partial_weight"], given["residual"]
    scale, shift = (
        None if given[name] is None else given[name].reshape(1, -1, 1, 1)
        for name in ("scale", "shift")
    )
    pixels = x.value[:, 0].numel()
    outs, fan_in = point_weight.value.shape

    def stored(computed: Computed) -> Computed:
        return computed.stored(dtype, is_truncated=is_truncated)

    z = x
    if scale is not None:
        z = z * scale
    if shift is not None:
        z = z + shift
    h = z.relu() if relu else z
    if residual is not None:
        h = h + residual
    h = stored(h)
    touched = 0 if partial_weight is None else partial_weight.value.shape[0]
    mixed = h
    if touched:
        kernel = partial_weight.value.shape[-1]

        def convolve(a: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(a, w, padding=kernel // 2)

        taps = touched * kernel**2
        convolved = stored(products(convolve, h[:, :touched], partial_weight, terms=taps))
        mixed = concatenate([convolved, h[:, touched:]], 1)

    def pointwise(a: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(a, w[:, :, None, None], groups=groups)

    y = stored(products(pointwise, mixed, point_weight, terms=fan_in))
    seen = exact(returned_y)
    found = {"y": y, "sums": seen.sum(PIXELS), "squared_sums": (seen * seen).sum(PIXELS)}

    grad_y, grad_sums, grad_squares = (None if g is None else exact(g) for g in grads)
    g = grad_y
    if grad_sums is not None:
        g = g + grad_sums.reshape(1, -1, 1, 1)
    if grad_squares is not None:
        g = g + (seen * grad_squares.reshape(1, -1, 1, 1)).times(2)
    g = stored(g)

    def transposed_pointwise(a: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose2d(a, w[:, :, None, None], groups=groups)

    dh = products(transposed_pointwise, g, point_weight, terms=outs // groups)

    def point_gradient(a: Tensor, b: Tensor) -> Tensor:
        shape = (outs, fan_in, 1, 1)
        return torch.nn.grad.conv2d_weight(b, shape, a, groups=groups)[:, :, 0, 0]

    found["point_weight"] = stored(products(point_gradient, g, mixed, terms=pixels))
    if touched:
        upstream = stored(dh[:, :touched])

        def partial_gradient(a: Tensor, b: Tensor) -> Tensor:
            shape = partial_weight.value.shape
            return torch.nn.grad.conv2d_weight(b, shape, a, padding=kernel // 2)

        found["partial_weight"] = stored(
            products(partial_gradient, upstream, h[:, :touched], terms=pixels)
        )

        def transposed_convolve(a: Tensor, w: Tensor) -> Tensor:
            return F.conv_transpose2d(a, w, padding=kernel // 2)

        through = products(transposed_convolve, upstream, partial_weight, terms=taps)
        dh = concatenate([through, dh[:, touched:]], 1)
    if residual is not None:
        found["residual"] = stored(dh)
    dz = dh.where_positive(z) if relu else dh
    if scale is not None:
        found["scale"] = (dz * x).sum(PIXELS)
    if shift is not None:
        found["shift"] = dz.sum(PIXELS)
    found["x"] = stored(dz if scale is None else dz * scale)
    return found


def affine_relu_bounds(
    x: Computed,
    scale: Computed,
    shift: Computed,
    grad: Computed,
    *,
    relu: bool,
    dtype: torch.dtype = torch.float32,
    is_truncated: bool = False,
) -> tuple[Computed, ...]:
    """y, and the gradients of x, scale and shift."""
    wide = scale.reshape(1, -1, 1, 1)
    z = x * wide + shift.reshape(1, -1, 1, 1)
    dz = grad.where_positive(z) if relu else grad
    y, grad_x = (
        t.stored(dtype, is_truncated=is_truncated) for t in (z.relu() if relu else z, dz * wide)
    )
    return y, grad_x, (dz * x).sum(PIXELS), dz.sum(PIXELS)


def batch_norm_bounds(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, *, relu: bool, eps: float
) -> dict[str, Computed]:
    """BatchNorm in training mode from sums: y, statistics and gradients by name."""
    x, weight, bias, grad = map(exact, (x, weight, bias, grad))
    count = x.value.numel() // x.value.shape[1]
    mean = x.sum(PIXELS).times(1 / count)
    var = (x * x).sum(PIXELS).times(1 / count) - mean * mean
    root = Computed(var.value + eps, var.error).rounded().rsqrt()
    scale = weight * root
    shift = bias - mean * scale
    y, through_x, d_scale, d_shift = affine_relu_bounds(x, scale, shift, grad, relu=relu)
    through_scale = d_scale - d_shift * mean
    d_var = (root * root * root * weight * through_scale).times(-0.5)
    d_mean = -(d_shift * weight * root)
    d_sum = (d_mean - (mean * d_var).times(2)).times(1 / count)
    d_square = d_var.times(1 / count)
    through_sums = d_sum.reshape(1, -1, 1, 1) + (x * d_square.reshape(1, -1, 1, 1)).times(2)
    return {
        "y": y,
        "x": through_x + through_sums,
        "weight": through_scale * root,
        "bias": d_shift,
        "mean": mean,
        "var": var,
    }
