"""The two ends of a BatchNorm whose statistics a convolution has left behind.

    mean = sums / n,  var = squared_sums / n - mean^2                    over n = N H W pixels
    scale = weight / sqrt(var + eps),  shift = bias - mean scale         `batch_norm_affine`
    y = act(x * scale + shift)                                           `affine_relu`

Between the two, the next `partial_pointwise_conv` applies scale and shift while it reads, so that
only a block's last BatchNorm needs `affine_relu`. Statistics are fp32 (fp64 for fp64 input) for any
dtype of x. The variance is a difference: it loses log2(mean^2 / var) bits.

Compiled code and dispatch modes see plain PyTorch, which the compiler fuses by itself; a plain
eager call takes one C++ (CPU) or Triton (CUDA) kernel each way. Unsupported there: double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import choose


def batch_norm_affine_reference(
    sums: Tensor, squared_sums: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    mean = sums / count
    var = (squared_sums / count - mean.square()).clamp(min=0)
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale, mean.detach(), var.detach()


def batch_norm_affine(
    sums: Tensor, squared_sums: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A training-mode BatchNorm as a scale and a shift.

    Args:
        sums: Per-channel sums of the activation [C].
        squared_sums: Per-channel sums of its squares [C].
        weight: gamma [C].
        bias: beta [C].
        count: Pixels summed over, N H W.
        eps: Added to the variance.

    Returns:
        scale and shift [C], differentiable towards the first four; mean and biased variance [C],
        for running statistics.
    """
    if choose("batch_norm_affine", sums) == "native" and not _is_traced():
        return _EagerAffine.apply(sums, squared_sums, weight, bias, count, eps)  # type: ignore[no-any-return]
    return batch_norm_affine_reference(sums, squared_sums, weight, bias, count, eps)


def affine_relu_reference(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    y = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return (y.relu() if relu else y).to(x.dtype)


def affine_relu(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, relu: bool) -> Tensor:
    """act(x * scale + shift) in one pass, rounded once.

    Args:
        x: [N, C, H, W].
        scale: [C], fp32 (fp64 for fp64 x), or None for 1.
        shift: [C], likewise, or None for 0.
        relu: Whether a ReLU follows.

    Returns:
        x's shape and dtype, channels_last in the fused backends; differentiable towards all three.
    """
    statistics = torch.promote_types(x.dtype, torch.float32)
    if scale is None:
        scale = x.new_ones(x.shape[1], dtype=statistics)
    if shift is None:
        shift = x.new_zeros(x.shape[1], dtype=statistics)
    backend = choose("affine_relu", x)
    if backend == "reference" or _is_traced():
        return affine_relu_reference(x, scale, shift, relu)
    return _EagerAffineRelu.apply(backend, x, scale, shift, relu)  # type: ignore[no-any-return]


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


# csrc/batch_norm.cpp: CPU, fp32.
for _schema in (
    "batch_norm_affine_native(Tensor sums, Tensor squared_sums, Tensor weight, Tensor bias, "
    "int count, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_affine_backward_native(Tensor grad_scale, Tensor grad_shift, Tensor mean, "
    "Tensor var, Tensor weight, int count, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "affine_relu_native(Tensor x, Tensor scale, Tensor shift, bool relu) -> Tensor",
    "affine_relu_backward_native(Tensor grad_y, Tensor x, Tensor scale, Tensor shift, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
):
    _name, _, _types = _schema.partition("(")
    torch.library.define(f"dfptkd::{_name}", f"({_types}", tags=torch.Tag.pt2_compliant_tag)


class _EagerAffine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sums: Tensor,
        squared_sums: Tensor,
        weight: Tensor,
        bias: Tensor,
        count: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        scale, shift, mean, var = torch.ops.dfptkd.batch_norm_affine_native.default(
            sums, squared_sums, weight, bias, count, eps
        )
        ctx.count, ctx.eps = count, eps
        ctx.save_for_backward(mean, var, weight)
        ctx.mark_non_differentiable(mean, var)
        return scale, shift, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_scale: Tensor, grad_shift: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = torch.ops.dfptkd.batch_norm_affine_backward_native.default(
            grad_scale, grad_shift, *ctx.saved_tensors, ctx.count, ctx.eps
        )
        return *grads, None, None


class _EagerAffineRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.backend, ctx.relu = backend, relu
        if backend == "triton":
            from .partial_pointwise_conv_triton import launch_affine_relu

            return launch_affine_relu(x, scale, shift, relu)
        return torch.ops.dfptkd.affine_relu_native.default(x, scale, shift, relu)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors
        if ctx.backend == "triton":
            from .partial_pointwise_conv_triton import launch_affine_relu_backward

            return None, *launch_affine_relu_backward(grad_y, x, scale, shift, ctx.relu), None
        grads = torch.ops.dfptkd.affine_relu_backward_native.default(
            grad_y, x, scale, shift, ctx.relu
        )
        return None, *grads, None
