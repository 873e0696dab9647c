"""`ce`: labels only. The student-only baseline, and how teachers are trained.

L = CE(z_S, y)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_path_loss import upcast
from .base import Method, StepOutput


class CrossEntropy(Method):
    """A network and its labels."""

    term_names = ("ce",)

    def forward(self, images: Tensor, target: Tensor, distillation: float = 1.0) -> StepOutput:
        logits = upcast(self.student(images))
        ce = F.cross_entropy(logits, target, label_smoothing=self.loss.label_smoothing)
        return StepOutput(ce, {"ce": ce.detach()}, (logits.argmax(dim=1) == target).sum())
