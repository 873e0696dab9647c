"""Vanilla knowledge distillation: the two-tensor member of the loss family of `dual_path_loss`.

    L = ce_weight CE(z_S, y) + kd_weight tau^2 KL(sg p_T || p_S)          p = softmax(z / tau)

Source: Hinton et al., arXiv 1503.02531; batch mean and tau^2 as in mdistiller and RepDistiller,
whose weights 0.1 / 0.9 and temperature 4 are the defaults.

In: student, teacher [B, C] of one floating dtype; target int64 [B] or class probabilities [B, C].
Out: fp32 (fp64 for fp64 input). Bytes moved by one pass: 2 reads of B C elements and 1 gradient
write.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Call, choose_at, decide_at, is_measuring
from .dual_path_loss import (
    FusedLoss,
    check_constants,
    check_logits,
    correct_count,
    counted_logits,
    counted_rows,
    cross_entropy_rows,
    fused_weights,
    kl_rows,
    loss_words,
    mean_over,
    weighted_sum,
)


class DistillationLoss(NamedTuple):
    """What `distillation_loss` returns."""

    total: Tensor
    """0-d, differentiable towards student."""
    terms: Tensor
    """[2], detached: unweighted cross-entropy and tau^2 KL."""
    correct: Tensor
    """0-d int64: rows whose largest student logit is the target class."""


def distillation_loss_reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    tau: float,
    ce_weight: float,
    kd_weight: float | Tensor,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> DistillationLoss:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    keep_B = counted_rows(target, ignore_index)
    s_BC, t_BC = counted_logits(student, keep_B), counted_logits(teacher.detach(), keep_B)
    q_BC, p_BC = (t_BC / tau).log_softmax(dim=1), (s_BC / tau).log_softmax(dim=1)
    if reverse_kl:
        q_BC, p_BC = p_BC, q_BC
    ce_B = cross_entropy_rows(s_BC, target, label_smoothing, ignore_index)
    terms = [mean_over(ce_B, keep_B), mean_over(tau**2 * kl_rows(q_BC, p_BC), keep_B)]
    return DistillationLoss(
        weighted_sum(terms, _weights(ce_weight, kd_weight), s_BC),
        torch.stack(terms).detach(),
        correct_count(s_BC, target, keep_B),
    )


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    tau: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float | Tensor = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reverse_kl: bool = False,
    is_root: bool = False,
) -> DistillationLoss:
    """Loss of a student under labels and one frozen teacher.

    Args:
        student: Student logits [B, C], fp16, bf16, fp32 or fp64.
        teacher: Teacher logits [B, C], same dtype and device; never gets a gradient.
        target: Labels, int64 [B], or class probabilities [B, C]; a hit then compares argmax.
        tau: Temperature of the KL term, above 0.
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of tau^2 KL: a number, or a 0-d tensor on the device, which a captured
            graph reads anew in every replay.
        label_smoothing: In [0, 1), for the cross-entropy.
        ignore_index: Rows with this label give no gradient and leave every mean and count.
        reverse_kl: KL(student || teacher) instead of KL(teacher || student).
        is_root: Promises that backward starts at the total itself: the gradient that arrives is 1,
            and no kernel multiplies by it.

    Returns:
        `DistillationLoss`; total and terms are fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, an option is out of its range, or
            teacher, target or kd_weight require grad, which they would not get.
        IndexError: A label is out of range (CPU; on a GPU a device-side assertion).
    """
    check_logits(target, tau, label_smoothing, student=student, teacher=teacher)
    check_constants("student, teacher, target", teacher=teacher, target=target, kd_weight=kd_weight)
    options = (label_smoothing, ignore_index, reverse_kl)
    words = loss_words(target, label_smoothing, reverse_kl)
    at = ("distillation_loss", student, student.shape, words)
    if is_measuring():
        call = functools.partial(
            distillation_loss,
            tau=tau,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reverse_kl=reverse_kl,
        )
        backend = decide_at(Call(call, (student, teacher, target)), *at)
    else:
        backend = choose_at(*at)
    if backend == "reference":
        return distillation_loss_reference(
            student, teacher, target, tau, ce_weight, kd_weight, *options
        )
    weights = fused_weights(_weights(ce_weight, kd_weight), student.device)
    inputs = (student, teacher, target, weights, tau, *options)
    return DistillationLoss(*_fused_distillation_loss(backend, is_root, *inputs))


def _weights(ce: float, kd: float | Tensor) -> tuple[float, ...] | Tensor:
    """Both weights; [2] on the device if one lies there."""
    return torch.stack([kd.new_full((), ce), kd]) if isinstance(kd, Tensor) else (ce, kd)


_fused_distillation_loss = FusedLoss("distillation_loss", ("student",), "teacher", num_terms=2)
