"""`ce`: labels only. The student-only baseline, and how teachers are trained.

L = CE(z_S, y)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_path_loss import upcast
from .base import Factor, Method, StepOutput


class CrossEntropy(Method):
    """A network and its labels."""

    term_names = ("ce",)

    def all_logits(self, images: Tensor, frozen: None = None) -> tuple[Tensor, ...]:
        return (self.student(images),)

    def losses(self, student: Tensor, target: Tensor, distillation: Factor) -> StepOutput:  # type: ignore[override]
        logits = upcast(student)
        ce = F.cross_entropy(logits, target, label_smoothing=self.loss.label_smoothing)
        return StepOutput(ce, {"ce": ce.detach()}, (logits.argmax(dim=1) == target).sum())
