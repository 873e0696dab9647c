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

MACs: N H W (k^2 c_p^2 + C_out C / groups). Bytes moved by one pass: read x (and residual), write y.
The backward reads x, y and grad_y (and residual) and writes the gradients of x (and residual); it
makes h again, which no formula counts. Unsupported: double backward in the fused backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import autocast_dtype, choose


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

    Under autocast x, residual and both weights are cast to its dtype, as a convolution's are.

    Returns:
        y [N, C_out, H, W]; its per-channel sum and sum of squares over N, H, W, each [C_out].

    Raises:
        ValueError: Shapes or devices do not fit together.
    """
    _check(x, scale, shift, partial_weight, point_weight, residual, groups)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, point_weight = x.to(dtype), point_weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
        partial_weight = None if partial_weight is None else partial_weight.to(dtype)
    backend = choose("partial_pointwise_conv", x)
    # Dispatch modes look into a call, to count its FLOPs for one: they see the reference.
    is_compiling = torch.compiler.is_compiling()
    if backend == "reference" or (is_in_torch_dispatch_mode() and not is_compiling):
        return partial_pointwise_conv_reference(
            x, scale, shift, partial_weight, point_weight, relu, residual, groups
        )
    inputs = (x, scale, shift, partial_weight, point_weight, residual, relu, groups)
    if is_compiling:
        return torch.ops.dfptkd.partial_pointwise_conv(*inputs)  # type: ignore[no-any-return]
    return _Eager.apply(backend, *inputs)  # type: ignore[no-any-return]


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


# The operators of the fused backends
# -----------------------------------------------------------------------
#
# `dfptkd::partial_pointwise_conv` and `..._backward` run on any device; compiled code sees them. A
# plain eager call goes past what torch.library adds in Python through an autograd.Function.
# `..._native` are csrc/partial_pointwise_conv.cpp: CPU, fp32.

_TENSORS = (
    "Tensor x, Tensor? scale, Tensor? shift, Tensor? partial_weight, Tensor point_weight, "
    "Tensor? residual"
)
_FORWARD = f"({_TENSORS}, bool relu, int groups) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_y, Tensor? grad_sums, Tensor? grad_squared_sums, {_TENSORS}, Tensor y, "
    "bool relu, int groups, bool needs_x, bool needs_weights, bool needs_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _suffix in ("", "_native"):
    for _name, _schema in (("", _FORWARD), ("_backward", _BACKWARD)):
        torch.library.define(
            f"dfptkd::partial_pointwise_conv{_name}{_suffix}",
            _schema,
            tags=torch.Tag.pt2_compliant_tag,
        )


@torch.library.register_fake("dfptkd::partial_pointwise_conv")
def _allocate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    count, height, width = x.shape[0], *x.shape[2:]
    channels = point_weight.shape[0]
    sums, squared_sums = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    return _empty_nhwc(x, (count, channels, height, width)), sums, squared_sums


@torch.library.register_fake("dfptkd::partial_pointwise_conv_backward")
def _allocate_backward(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, _, x, scale, shift, partial_weight, point_weight, _, _, _, _, *needs = inputs
    needs_x, needs_weights, needs_residual = needs

    def like(tensor: Tensor | None, is_needed: bool) -> Tensor:
        if tensor is None or not is_needed:
            return x.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    def activation(is_needed: bool) -> Tensor:
        return _empty_nhwc(x, x.shape) if is_needed else x.new_empty(0)

    return (
        activation(needs_x),
        like(scale, needs_x),
        like(shift, needs_x),
        like(partial_weight, needs_weights),
        like(point_weight, needs_weights),
        activation(needs_residual),
    )


def _empty_nhwc(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch(backend: str, *inputs: Any) -> tuple[Tensor, ...]:
    if backend == "triton":
        from .partial_pointwise_conv_triton import launch_forward

        return launch_forward(*inputs)
    return torch.ops.dfptkd.partial_pointwise_conv_native.default(*inputs)  # type: ignore[no-any-return]


def _launch_backward(backend: str, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale, shift, both weights and residual; None where not asked for."""
    if backend == "triton":
        from .partial_pointwise_conv_triton import launch_backward

        return launch_backward(*inputs)
    found = torch.ops.dfptkd.partial_pointwise_conv_backward_native.default(*inputs)
    _, _, _, _, scale, shift, partial_weight, _, _, _, _, _, *needs = inputs
    needs_x, needs_weights, needs_residual = needs
    wanted = (
        needs_x,
        needs_x and scale is not None,
        needs_x and shift is not None,
        needs_weights and partial_weight is not None,
        needs_weights,
        needs_residual,
    )
    return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))


def _serve(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _launch(_fused_backend(x), x, *rest)


def _serve_backward(*inputs: Any) -> tuple[Tensor, ...]:
    x = inputs[3]
    grads = _launch_backward(_fused_backend(x), *inputs)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _fused_backend(x: Tensor) -> str:
    backend = choose("partial_pointwise_conv", x)
    if backend == "reference":
        raise RuntimeError(
            f"partial_pointwise_conv has no fused backend for {x.dtype} on {x.device} here: call "
            "dfptkd.kernels.partial_pointwise_conv instead"
        )
    return backend


torch.library.impl("dfptkd::partial_pointwise_conv", ("cpu", "cuda"), _serve)
torch.library.impl("dfptkd::partial_pointwise_conv_backward", ("cpu", "cuda"), _serve_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    *tensors, relu, groups = inputs
    ctx.relu, ctx.groups = relu, groups
    ctx.save_for_backward(*tensors, y)
    ctx.set_materialize_grads(False)


def _backward_inputs(
    ctx: Any, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    """Arguments of the backward from those of `_FORWARD` that need a gradient."""
    grad_y, grad_sums, grad_squared_sums = grads
    *tensors, y = ctx.saved_tensors
    return (
        torch.zeros_like(y) if grad_y is None else grad_y,  # only the sums were used
        grad_sums,
        grad_squared_sums,
        *tensors,
        y,
        ctx.relu,
        ctx.groups,
        any(needed[:3]),
        any(needed[3:5]),
        needed[5],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[0])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    found = torch.ops.dfptkd.partial_pointwise_conv_backward(*_backward_inputs(ctx, needed, grads))
    present = [tensor is not None for tensor in ctx.saved_tensors[:6]]
    wanted = [n and p for n, p in zip(needed, present, strict=False)]
    return *[grad if want else None for grad, want in zip(found, wanted, strict=True)], None, None


torch.library.register_autograd(
    "dfptkd::partial_pointwise_conv", _backward, setup_context=_setup_context
)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> tuple[Tensor, ...]:
        output = _launch(backend, *inputs)
        _save(ctx, inputs, output[0])
        ctx.backend = backend
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _backward_inputs(ctx, ctx.needs_input_grad[1:], grads)
        return None, *_launch_backward(ctx.backend, *inputs), None, None
