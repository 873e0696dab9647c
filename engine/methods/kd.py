"""`kd`: vanilla knowledge distillation (Hinton et al., arXiv 1503.02531).

L = kd_ce CE(z_S, y) + kd_kl tau^2 KL(p_T || p_S)
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import distillation_loss
from .base import Factor, FrozenTeacherMethod, StepOutput


class KnowledgeDistillation(FrozenTeacherMethod):
    """Weights 0.1 / 0.9 and temperature 4 are those of mdistiller and RepDistiller."""

    term_names = ("ce", "kl")
    operation = "distillation_loss"

    def losses(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, target: Tensor, distillation: Factor
    ) -> StepOutput:
        loss = self.loss
        result = distillation_loss(
            student,
            teacher,
            target,
            tau=loss.tau,
            ce_weight=loss.kd_ce,
            kd_weight=loss.kd_kl * distillation,
            label_smoothing=loss.label_smoothing,
            reverse_kl=loss.reverse_kl,
        )
        return StepOutput(
            result.total,
            dict(zip(self.term_names, result.terms.unbind(), strict=True)),
            result.correct,
        )
