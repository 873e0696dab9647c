"""`dkd`: decoupled knowledge distillation (Zhao et al., CVPR 2022; mdistiller).

With b = (p_t, 1 - p_t) and p^ the distribution renormalised over the non-target classes,

    KL(p_T || p_S) = KL(b_T || b_S) + (1 - p_{T,t}) KL(p^_T || p^_S)

and DKD gives the two parts weights of their own, without the factor (1 - p_{T,t}):

    L = dkd_ce CE(z_S, y) + tau^2 [dkd_alpha KL(b_T || b_S) + dkd_beta KL(p^_T || p^_S)]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_path_loss import kl_rows, upcast
from .base import Factor, FrozenTeacherMethod, StepOutput


class DecoupledKL(NamedTuple):
    """Parts of KL(p_T || p_S), [B] each: target + (1 - target_prob) * nontarget is the whole."""

    target: Tensor
    nontarget: Tensor
    target_prob: Tensor
    """Probability that the supervisor gives the target class."""


def decoupled_kl(supervisor: Tensor, learner: Tensor, target: Tensor, tau: float) -> DecoupledKL:
    """Target and non-target parts of KL(softmax(supervisor / tau) || softmax(learner / tau)).

    Args:
        supervisor: Logits [B, C].
        learner: Logits [B, C].
        target: int64 [B].
        tau: Temperature.
    """
    is_target_BC = F.one_hot(target, supervisor.shape[1]).bool()

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        scaled = upcast(z) / tau
        others = scaled.masked_fill(is_target_BC, -torch.inf)
        log_target = scaled.log_softmax(dim=1).gather(1, target[:, None])  # [B, 1]
        # log(1 - p_t) by a difference of log-sums: 1 - exp(log p_t) would lose all digits as p_t
        # -> 1.
        log_others = (others.logsumexp(dim=1) - scaled.logsumexp(dim=1))[:, None]
        return torch.cat([log_target, log_others], dim=1), others.log_softmax(dim=1)

    (binary_q, others_q), (binary_p, others_p) = parts(supervisor), parts(learner)
    return DecoupledKL(
        kl_rows(binary_q, binary_p), kl_rows(others_q, others_p), binary_q[:, 0].exp()
    )


class DecoupledDistillation(FrozenTeacherMethod):
    """beta as published by pair; a warm-up of 20 epochs belongs to the CIFAR-100 protocol."""

    term_names = ("ce", "target", "nontarget")

    def losses(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, target: Tensor, distillation: Factor
    ) -> StepOutput:
        loss = self.loss
        student = upcast(student)
        ce = F.cross_entropy(student, target, label_smoothing=loss.label_smoothing)
        parts = decoupled_kl(teacher, student, target, loss.tau)
        target_part = loss.tau**2 * parts.target.mean()
        nontarget = loss.tau**2 * parts.nontarget.mean()
        total = loss.dkd_ce * ce + distillation * (
            loss.dkd_alpha * target_part + loss.dkd_beta * nontarget
        )
        terms = {"ce": ce, "target": target_part, "nontarget": nontarget}
        return StepOutput(
            total,
            {name: term.detach() for name, term in terms.items()},
            (student.argmax(dim=1) == target).sum(),
        )
