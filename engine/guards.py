"""The certificate of step 0: the fused loss against the reference, on the run's first real batch.

A kernel that is wrong on the machine at hand would otherwise train a slightly different objective
without a sign. Both compute loss and gradients from the same logits; what differs beyond rounding
makes the run fall back to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import use_backend, which_backend
from .methods import Method
from .models.parts import eval_mode

# Largest difference, relative to the largest value, that rounding explains: of the loss, which both
# sum in fp32, and of a gradient, which is rounded once to the logits' dtype.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Certificate:
    """How far the fused loss is from the reference, relative to the largest value."""

    backend: str
    loss: float
    gradient: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; NaN does not."""
        tolerance = GRADIENT_TOLERANCE.get(self.dtype, 1e-4)
        return self.loss <= LOSS_TOLERANCE and self.gradient <= tolerance

    def __str__(self) -> str:
        return (
            f"loss[{self.backend}] against reference on the first batch: "
            f"loss differs by {self.loss:.1e}, gradient by {self.gradient:.1e} (relative)"
        )


def certify(method: Method, images: Tensor, target: Tensor) -> Certificate | None:
    """Compare the loss that a run will use with the reference; None where that is the reference.

    Args:
        method: The method, whose state is left as it is.
        images: Normalised images [B, 3, H, W] of the first batch.
        target: int64 [B].
    """
    if method.operation is None:
        return None
    with eval_mode(method), torch.no_grad():  # no BatchNorm statistics move
        logits = [z.detach() for z in method.all_logits(images)]
    backend = which_backend(method.operation, logits[0])
    if backend == "reference":
        return None
    fused_loss, fused = _loss_and_gradients(method, logits, target)
    with use_backend("reference"):
        loss, gradients = _loss_and_gradients(method, logits, target)
    return Certificate(
        backend,
        _difference([fused_loss], [loss]),
        _difference(fused, gradients),
        logits[0].dtype,
    )


def _loss_and_gradients(
    method: Method, logits: list[Tensor], target: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [z.clone().requires_grad_() for z in logits]
    total = method.losses(*leaves, target, 1.0).total
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), [g for g in gradients if g is not None]


def _difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    """Largest difference over the largest reference value."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, reference, strict=True)]
    scale = max(b.abs().max().item() for _, b in pairs)
    differences = torch.stack([(a - b).abs().max() for a, b in pairs])  # max() keeps a NaN
    return differences.max().item() / max(scale, 1e-30)
