"""All loss terms of a dual-path step: two cross-entropies, four temperature KL terms, two hit
counts.

    L = w_ce CE(z_S, y) + alpha   tau^2 KL(sg p_T || p_S) + beta     tau^2 KL(sg p_P || p_S)
      + v_ce CE(z_P, y) + lambda_T tau^2 KL(sg p_T || p_P) + lambda_S tau^2 KL(sg p_S || p_P)

with p = softmax(z / tau), KL(q || p) = sum_c q (log q - log p), the mean over the rows that
count, and sg a detach. The objective is *our reading* of DFPT-KD (arXiv 2506.18244): the paper's
equations are not known to us. `reverse_kl` swaps the arguments of the four KL terms; the
supervisor stays the detached one.

In: student, prompt, teacher [B, C] of one floating dtype; target int64 [B] or class probabilities
[B, C]. Out: fp32 (fp64 for fp64 input). Accumulates in the output's dtype, in the log domain
throughout. Bytes moved by one pass: 3 reads of B C elements and 2 gradient writes. FLOPs: about
40 B C, exponentials counted as one. Unsupported: double backward in the fused backends; a gradient
towards teacher, target or weights.

Suffixes: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose


@dataclass(frozen=True)
class DualPathWeights:
    """Weights of the six terms, in the order used everywhere (1 each: *our reading*)."""

    student_ce: float = 1.0
    student_teacher: float = 1.0
    student_prompt: float = 1.0
    prompt_ce: float = 1.0
    prompt_teacher: float = 1.0
    prompt_student: float = 1.0


class DualPathLoss(NamedTuple):
    """What `dual_path_loss` returns."""

    total: Tensor
    """0-d, differentiable towards student and prompt."""
    terms: Tensor
    """[6], detached: the unweighted means, in the order of `DualPathWeights`."""
    student_correct: Tensor
    """0-d int64: rows whose largest student logit is the target class."""
    prompt_correct: Tensor
    """0-d int64: the same for the prompt path."""


def dual_path_loss_reference(
    student: Tensor,
    prompt: Tensor,
    teacher: Tensor,
    target: Tensor,
    tau: float,
    weights: DualPathWeights | Tensor,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> DualPathLoss:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    keep_B = counted_rows(target, ignore_index)
    s_BC, p_BC, t_BC = (counted_logits(z, keep_B) for z in (student, prompt, teacher.detach()))
    log_s_BC, log_p_BC, log_t_BC = ((z / tau).log_softmax(dim=1) for z in (s_BC, p_BC, t_BC))

    def kl(supervisor: Tensor, learner: Tensor) -> Tensor:
        q, p = supervisor.detach(), learner
        return tau**2 * (kl_rows(p, q) if reverse_kl else kl_rows(q, p))

    rows = (
        cross_entropy_rows(s_BC, target, label_smoothing, ignore_index),
        kl(log_t_BC, log_s_BC),
        kl(log_p_BC, log_s_BC),
        cross_entropy_rows(p_BC, target, label_smoothing, ignore_index),
        kl(log_t_BC, log_p_BC),
        kl(log_s_BC, log_p_BC),
    )
    terms = [mean_over(row_B, keep_B) for row_B in rows]
    if isinstance(weights, DualPathWeights):
        total = weighted_sum(terms, astuple(weights), s_BC, p_BC)
    else:
        total = weighted_sum(terms, weights, s_BC, p_BC)
    return DualPathLoss(
        total,
        torch.stack(terms).detach(),
        correct_count(s_BC, target, keep_B),
        correct_count(p_BC, target, keep_B),
    )


def dual_path_loss(
    student: Tensor,
    prompt: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    tau: float = 4.0,
    weights: DualPathWeights | Tensor = DualPathWeights(),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reverse_kl: bool = False,
) -> DualPathLoss:
    """Loss of student and prompt path under labels, original path and each other.

    Args:
        student: Student logits [B, C], fp16, bf16, fp32 or fp64.
        prompt: Prompt-path logits [B, C], same dtype and device.
        teacher: Original-path logits [B, C], same dtype and device; never gets a gradient.
        target: Labels, int64 [B], or class probabilities [B, C] (mixup, cutmix); a hit then
            compares argmax.
        tau: Temperature of the KL terms, above 0.
        weights: Six numbers, or a tensor [6] on the device. A zero weight drops the gradient only.
        label_smoothing: In [0, 1), for both cross-entropies.
        ignore_index: Rows with this label give no gradient and leave every mean and count.
        reverse_kl: KL(learner || supervisor) instead of KL(supervisor || learner).

    Returns:
        `DualPathLoss`; total and terms are fp32, or fp64 for fp64 logits. With no row to count
        all are 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or an option is out of its range.
        IndexError: A label is out of range (CPU; on a GPU a device-side assertion).
    """
    check_logits(target, tau, label_smoothing, student=student, prompt=prompt, teacher=teacher)
    if isinstance(weights, Tensor) and weights.shape != (6,):
        raise ValueError(f"weights: expected a tensor of shape [6], got {list(weights.shape)}")
    choose("dual_path_loss", student)
    return dual_path_loss_reference(
        student, prompt, teacher, target, tau, weights, label_smoothing, ignore_index, reverse_kl
    )


# What the family of losses shares
# -----------------------------------------------------------------------


def upcast(z: Tensor) -> Tensor:
    """Logits in the dtype that sums are made in: fp64 stays, all else becomes fp32."""
    return z if z.dtype == torch.float64 else z.float()


def kl_rows(log_q_BC: Tensor, log_p_BC: Tensor) -> Tensor:
    """KL(q || p) of each row [B] from log-probabilities.

    Classes of probability 0 under q (a logit of -inf) add nothing, also not to the gradient:
    without the mask they would be 0 * (inf - inf).
    """
    difference = torch.where(log_q_BC == -torch.inf, 0.0, log_q_BC - log_p_BC)
    return (log_q_BC.exp() * difference).sum(dim=1)


def cross_entropy_rows(
    z_BC: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """Cross-entropy of each row [B]; 0 where the row is ignored."""
    if not target.is_floating_point():
        return F.cross_entropy(
            z_BC,
            target,
            reduction="none",
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    y_BC = target.detach().to(z_BC.dtype) * (1 - label_smoothing) + label_smoothing / z_BC.shape[1]
    # As in kl_rows: a class of probability 0 adds nothing even where its logit is -inf.
    return -torch.where(y_BC == 0, 0.0, y_BC * z_BC.log_softmax(dim=1)).sum(dim=1)


def counted_logits(z_BC: Tensor, keep_B: Tensor) -> Tensor:
    """Logits in the dtype of the sums, ignored rows blanked so that nothing in them can spread."""
    return torch.where(keep_B[:, None], upcast(z_BC), 0.0)


def counted_rows(target: Tensor, ignore_index: int) -> Tensor:
    """bool [B]: the rows that enter means and counts."""
    if target.is_floating_point():
        return torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
    return target != ignore_index


def mean_over(row_B: Tensor, keep_B: Tensor) -> Tensor:
    """Mean over the counted rows, 0 if there is none."""
    return torch.where(keep_B, row_B, 0.0).sum() / keep_B.sum().clamp(min=1)


def weighted_sum(
    terms: list[Tensor], weights: Sequence[float] | Tensor, *learners: Tensor
) -> Tensor:
    """Sum of weight * term. A number 0 takes the term out of the graph, whatever its value.

    Every learner stays on the graph (by the sum of none of its rows), so that it gets a gradient,
    zeros if need be, under any weights.
    """
    anchor = torch.stack([z_BC[:0].sum() for z_BC in learners]).sum()
    if isinstance(weights, Tensor):
        return (weights.to(anchor.dtype).detach() * torch.stack(terms)).sum() + anchor
    return sum((w * t for w, t in zip(weights, terms, strict=True) if w != 0), start=anchor)


def correct_count(z_BC: Tensor, target: Tensor, keep_B: Tensor) -> Tensor:
    """0-d int64: counted rows whose largest logit is the target class."""
    label_B = target.argmax(dim=1) if target.is_floating_point() else target
    return ((z_BC.argmax(dim=1) == label_B) & keep_B).sum()


def check_logits(target: Tensor, tau: float, label_smoothing: float, **logits: Tensor) -> None:
    """The checks of the loss family, before any work; `logits` by argument name."""
    (first_name, first), *others = logits.items()
    if first.dim() != 2 or not first.is_floating_point() or first.shape[1] == 0:
        raise ValueError(
            f"{first_name}: expected floating logits [B, C], got {first.dtype} {list(first.shape)}"
        )
    for name, z in others:
        if z.shape != first.shape or z.dtype != first.dtype or z.device != first.device:
            raise ValueError(
                f"{name}: expected {first.dtype} {list(first.shape)} on {first.device} like "
                f"{first_name}, got {z.dtype} {list(z.shape)} on {z.device}"
            )
    shape = first.shape if target.is_floating_point() else first.shape[:1]
    if target.shape != shape or target.device != first.device or target.dtype in _NOT_LABELS:
        raise ValueError(
            f"target: expected int64 [{first.shape[0]}] or probabilities {list(first.shape)} on "
            f"{first.device}, got {target.dtype} {list(target.shape)} on {target.device}"
        )
    if not tau > 0:
        raise ValueError(f"tau: expected a temperature above 0, got {tau}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {label_smoothing}")


_NOT_LABELS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32)
