"""`dist`: distillation from a stronger teacher (Huang et al., NeurIPS 2022).

    L = dist_ce CE(z_S, y) + tau^2 [dist_inter (1 - mean_b rho(p_S[b, :], p_T[b, :]))
                                  + dist_intra (1 - mean_c rho(p_S[:, c], p_T[:, c]))]

with rho Pearson's correlation and p = softmax(z / tau).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_path_loss import upcast
from .base import Factor, FrozenTeacherMethod, StepOutput


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of a and b along `dim`."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim, eps=1e-8)


class StrongTeacherDistillation(FrozenTeacherMethod):
    """Published: CE 1, both correlations 2 (KD weight 2 times 1), tau 4, on ImageNet 1."""

    term_names = ("ce", "inter", "intra")

    def losses(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, target: Tensor, distillation: Factor
    ) -> StepOutput:
        loss = self.loss
        student, teacher = upcast(student), upcast(teacher)
        ce = F.cross_entropy(student, target, label_smoothing=loss.label_smoothing)
        p_S, p_T = (student / loss.tau).softmax(dim=1), (teacher / loss.tau).softmax(dim=1)
        inter = loss.tau**2 * (1 - pearson(p_S, p_T, dim=1).mean())
        intra = loss.tau**2 * (1 - pearson(p_S, p_T, dim=0).mean())
        total = loss.dist_ce * ce + distillation * (
            loss.dist_inter * inter + loss.dist_intra * intra
        )
        terms = {"ce": ce, "inter": inter, "intra": intra}
        return StepOutput(
            total,
            {name: term.detach() for name, term in terms.items()},
            (student.argmax(dim=1) == target).sum(),
        )
