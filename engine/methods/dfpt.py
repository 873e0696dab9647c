"""`dfpt` and `dfpt_plus`: dual-forward-path teacher (arXiv 2506.18244); objective *our reading*.

    L_S = w_ce CE(z_S, y) + alpha   tau^2 KL(sg p_T || p_S) + beta     tau^2 KL(sg p_P || p_S)
    L_P = v_ce CE(z_P, y) + lambda_T tau^2 KL(sg p_T || p_P) + lambda_S tau^2 KL(sg p_S || p_P)

One forward per network, one backward of L_S + L_P: the detaches keep the two gradients apart.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import DualPathWeights, dual_path_loss
from ...kernels.dual_path_loss import upcast
from ..config import LossConfig, OptimConfig
from ..models.dual_path import DualPathTeacher, FrozenOutputs
from .base import Factor, FrozenTeacherMethod, Method, StepOutput, below

TERMS = (
    "student_ce",
    "student_teacher",
    "student_prompt",
    "prompt_ce",
    "prompt_teacher",
    "prompt_student",
)


def path_weights(loss: LossConfig, distillation: Factor) -> DualPathWeights | Tensor:
    """The six weights, KL terms scaled by the warm-up factor `distillation`; [6] for a tensor."""
    if isinstance(distillation, Tensor):
        fixed = {"student_ce", "prompt_ce"}
        weights = {term: getattr(loss, term) for term in TERMS}
        return torch.stack(
            [
                distillation.new_full((), weight) if term in fixed else weight * distillation
                for term, weight in weights.items()
            ]
        )
    return DualPathWeights(
        student_ce=loss.student_ce,
        student_teacher=loss.student_teacher * distillation,
        student_prompt=loss.student_prompt * distillation,
        prompt_ce=loss.prompt_ce,
        prompt_teacher=loss.prompt_teacher * distillation,
        prompt_student=loss.prompt_student * distillation,
    )


class DualPathDistillation(Method):
    """Student and prompt path together; DFPT-KD+ where the teacher has a copied backbone."""

    term_names = TERMS
    operation = "dual_path_loss"

    def __init__(self, student: nn.Module, teacher: DualPathTeacher, loss: LossConfig) -> None:
        super().__init__(student, loss)
        self.teacher = teacher

    def compile_regions(self, **options: Any) -> None:
        super().compile_regions(**options)
        self.teacher.compile_paths(**options)

    def frozen_teacher(self) -> nn.Module | None:
        return self.teacher.original

    def share_teacher(self, other: Method) -> None:
        assert isinstance(other, DualPathDistillation)
        self.teacher.original = other.teacher.original

    def frozen_outputs(self, images: Tensor) -> FrozenOutputs | None:
        return self.teacher.frozen_outputs(images)

    def frozen_start(self, images: Tensor) -> Tensor | None:
        return self.teacher.frozen_start(images)

    def frozen_logits(self, start: Tensor) -> Tensor:
        return self.teacher.frozen_logits(start)

    def trained_networks(self) -> list[nn.Module]:
        return [*super().trained_networks(), *self.teacher.trained_networks()]

    def trained_buffers(self) -> list[Tensor]:
        return [*super().trained_buffers(), *self.teacher.trained_buffers()]

    def all_logits(self, images: Tensor, frozen: FrozenOutputs | None = None) -> tuple[Tensor, ...]:
        teacher_logits, prompt_logits = self.teacher(images, frozen)
        return self.student(images), prompt_logits, teacher_logits

    def losses(  # type: ignore[override]
        self,
        student: Tensor,
        prompt: Tensor,
        teacher: Tensor,
        target: Tensor,
        distillation: Factor,
    ) -> StepOutput:
        result = dual_path_loss(
            student,
            prompt,
            teacher,
            target,
            tau=self.loss.tau,
            weights=self.weights(distillation),
            label_smoothing=self.loss.label_smoothing,
            reverse_kl=self.loss.reverse_kl,
        )
        return StepOutput(
            result.total,
            dict(zip(TERMS, result.terms.unbind(), strict=True)),
            result.student_correct,
            result.prompt_correct,
        )

    def weights(self, distillation: Factor) -> DualPathWeights | Tensor:
        """Of the fused terms, as `path_weights`."""
        return path_weights(self.loss, distillation)

    def prompt_logits(self, images: Tensor) -> Tensor:
        return self.teacher.prompt_path(images)

    def teacher_logits(self, images: Tensor) -> Tensor:
        return self.teacher.original_path(images)

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        prompt_lr = optim.lr * optim.prompt_lr_scale
        groups = super().parameter_groups(optim)
        groups.append(
            {"name": "prompt", "params": self.teacher.prompt_parameters(), "lr": prompt_lr}
        )
        if self.teacher.finetune_backbone:
            lr = prompt_lr * optim.backbone_lr_scale
            params = self.teacher.backbone_parameters()
            groups.append({"name": "backbone", "params": params, "lr": lr})
        return groups

    def trained_state(self) -> dict[str, Tensor]:
        prompt = {f"prompt.{k}": v for k, v in self.teacher.trained_state().items()}
        return {**super().trained_state(), **prompt}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        super().load_trained_state(state)
        self.teacher.load_trained_state(below("prompt.", state))


class MixtureControl(FrozenTeacherMethod):
    """Control arm (M21): no prompt modules, their optimum in closed form as the soft target.

    For fixed targets at one temperature the unconstrained minimiser of lambda_T KL(p_T || p) +
    lambda_S KL(p_S || p) is the arithmetic mixture of p_T and p_S; at tau = 1 the one-hot label
    joins with weight v_ce. With reversed arguments it is the normalised geometric mean (which a
    one-hot would make degenerate, so there v_ce has no part).
    """

    term_names = TERMS[:3]

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: LossConfig) -> None:
        super().__init__(student, teacher, loss)
        # here and not where the losses are traced: Dynamo of torch 2.11 knows no `replace`
        self.student_only = dataclasses.replace(
            loss, mixture_control=False, prompt_ce=0.0, prompt_teacher=0.0, prompt_student=0.0
        )

    def losses(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, target: Tensor, distillation: Factor
    ) -> StepOutput:
        # In fp32 under autocast too: bf16 would round the mixture's log-probabilities.
        student, teacher = upcast(student), upcast(teacher)
        mixture = self.mixture_logits(student.detach(), teacher, target)
        result = dual_path_loss(
            student,
            mixture,
            teacher,
            target,
            tau=self.loss.tau,
            weights=path_weights(self.student_only, distillation),
            label_smoothing=self.loss.label_smoothing,
            reverse_kl=self.loss.reverse_kl,
        )
        return StepOutput(
            result.total,
            dict(zip(self.term_names, result.terms[:3].unbind(), strict=True)),
            result.student_correct,
        )

    def mixture_logits(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Logits [B, C] whose softmax at tau is the mixture; without a graph.

        Args:
            student: Logits [B, C].
            teacher: Logits [B, C].
            target: int64 [B].
        """
        loss = self.loss
        log_T, log_S = ((upcast(z) / loss.tau).log_softmax(dim=1) for z in (teacher, student))
        weights = [loss.prompt_teacher, loss.prompt_student]
        if loss.reverse_kl:
            share = _shares(weights)
            return loss.tau * (share[0] * log_T + share[1] * log_S)
        parts = [log_T, log_S]
        if loss.tau == 1 and loss.prompt_ce > 0:
            one_hot = torch.full_like(log_T, -torch.inf).scatter(1, target[:, None], 0.0)
            weights, parts = [*weights, loss.prompt_ce], [*parts, one_hot]
        shifted = [
            part + math.log(share)
            for part, share in zip(parts, _shares(weights), strict=True)
            if share > 0
        ]
        return loss.tau * torch.stack(shifted).logsumexp(dim=0)


def _shares(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]
