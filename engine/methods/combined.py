"""`dfpt` and `dfpt_plus` with terms of other methods in the student's objective (M49).

    L_S' = L_S + rkd_distance L_D + rkd_angle L_A + crd L_CRD              see rkd.py, crd.py

and with `decoupled` each of the student's two KL terms becomes DKD's, see dkd.py:

    tau^2 KL(sg p || p_S)  ->  tau^2 [dkd_alpha KL(b || b_S) + dkd_beta KL(p^ || p^_S)]   p_T, p_P

How the paper would combine them is not known to us. *Our reading*: RKD and CRD learn from the
prompt path's features, which are the knowledge that DFPT-KD makes for this student; those of the
original path are what the method holds to be out of its reach. They are detached, so that L_S still
gives the prompt path no gradient, and are what its head reads, pooled, after the last fusion block.
CRD's embeddings, the supervisor's too, are trained beside the student, at its learning rate.
The warm-up scales all of these terms. RKD relates the images of one part of a batch
(`accumulate`) in one process; CRD's term does not depend on how a batch is cut.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import DualPathWeights
from ..config import LossConfig, OptimConfig
from ..errors import UsageError
from ..models.dual_path import DualPathTeacher, FrozenOutputs
from ..models.parts import pooled
from ..models.stages import Stages, split_stages
from .base import BankRows, Factor, Samples, StepOutput, below
from .crd import Contrast
from .dfpt import DualPathDistillation, path_weights
from .dkd import decoupled_kl
from .rkd import relational_terms

SUPERVISORS = ("student_teacher", "student_prompt")
"""The terms that `decoupled` splits; each part is logged as <term>_target, <term>_nontarget."""


class CombinedDistillation(DualPathDistillation):
    """DFPT-KD(+) with what `loss.added` names.

    Args:
        student: A model that `split_stages` can cut, where features are asked for.
        teacher: As of `DualPathDistillation`.
        loss: At least one of its added terms is on.
        labels: Of the training images, int64 [N]; for CRD.
        seed: Of CRD's draws.

    Raises:
        UsageError: The student's features cannot be had.
        DataError: All images are of one class, which CRD cannot contrast.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: DualPathTeacher,
        loss: LossConfig,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, teacher, loss)
        self.term_names = (*self.term_names, *added_names(loss))
        self.takes_features = bool(set(loss.added) - {"decoupled"})
        # The fused loss still says what the whole terms are, and gives them no gradient.
        whole = dict.fromkeys(SUPERVISORS, 0.0) if loss.decoupled else {}
        self.fused = dataclasses.replace(loss, **whole)  # type: ignore[arg-type]
        self._pieces: Stages | None = None
        self.contrast: Contrast | None = None
        if self.takes_features:
            widths = _cut(student).width, teacher.width
        if loss.crd:
            if labels is None:
                raise TypeError("loss.crd takes the labels of the training images")
            self.contrast = Contrast(widths, labels, loss.crd_negatives, seed)
        self.takes_samples = self.contrast is not None

    def compile_regions(self, **options: Any) -> None:
        super().compile_regions(**options)
        written = type(self).student_with_features.__get__(self)
        self.student_with_features = torch.compile(written, **options)  # type: ignore[method-assign]

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        distillation: Factor = 1.0,
        samples: Samples | None = None,
        *,
        frozen: FrozenOutputs | None = None,
    ) -> StepOutput:
        if not self.takes_features:
            return super().forward(images, target, distillation, frozen=frozen)
        (teacher, prompt), knowledge = self.teacher.with_features(images, frozen)
        if self._pieces is None:  # not before: BatchNorms may be exchanged after a method is built
            self._pieces = _cut(self.student)
        student, features = self.student_with_features(images)
        output = self.losses(student, prompt, teacher, target, distillation)
        with torch.autocast(images.device.type, enabled=False):  # relations in full precision
            terms = self.relations(features, knowledge.detach())
            if self.contrast is not None:
                assert samples is not None
                found = self.contrast(features, knowledge.detach(), target, samples)
                terms["crd"], output.rows = found
        return self._with(output, terms, distillation)

    def student_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] of the student and its features [B, D]: see `pooled`."""
        assert self._pieces is not None
        x = images
        for stage in self._pieces.stages:
            x = stage(x)
        x = self._pieces.neck(x)
        return self._pieces.head(x), pooled(x)

    def losses(  # type: ignore[override]
        self,
        student: Tensor,
        prompt: Tensor,
        teacher: Tensor,
        target: Tensor,
        distillation: Factor,
    ) -> StepOutput:
        output = super().losses(student, prompt, teacher, target, distillation)
        if not self.loss.decoupled:
            return output
        terms: dict[str, Tensor] = {}
        for name, supervisor in zip(SUPERVISORS, (teacher, prompt), strict=True):
            parts = decoupled_kl(supervisor.detach(), student, target, self.loss.tau)
            terms[f"{name}_target"] = self.loss.tau**2 * parts.target.mean()
            terms[f"{name}_nontarget"] = self.loss.tau**2 * parts.nontarget.mean()
        return self._with(output, terms, distillation)

    def weights(self, distillation: Factor) -> DualPathWeights | Tensor:
        return path_weights(self.fused, distillation)

    def relations(self, student: Tensor, knowledge: Tensor) -> dict[str, Tensor]:
        """RKD's terms that are on, 0-d each, by name.

        Args:
            student: Features [B, C].
            knowledge: Those of the prompt path [B, D], without a graph.
        """
        names = [name for name in ("rkd_distance", "rkd_angle") if getattr(self.loss, name)]
        if not names:
            return {}
        distance, angle = relational_terms(student, knowledge)
        terms = {"rkd_distance": distance, "rkd_angle": angle}
        return {name: terms[name] for name in names}

    def remember(self, rows: BankRows, passes: Tensor) -> None:
        assert self.contrast is not None
        self.contrast.remember(rows, passes)

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        groups = super().parameter_groups(optim)
        if self.contrast is not None:
            params = list(self.contrast.parameters())
            groups.append({"name": "embeddings", "params": params, "lr": optim.lr})
        return groups

    def trained_state(self) -> dict[str, Tensor]:
        contrast = {} if self.contrast is None else self.contrast.state_dict()
        return {**super().trained_state(), **{f"crd.{k}": v for k, v in contrast.items()}}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        super().load_trained_state(state)
        if self.contrast is not None:
            self.contrast.load_state_dict(below("crd.", state))

    def _with(
        self, output: StepOutput, terms: dict[str, Tensor], distillation: Factor
    ) -> StepOutput:
        """`output` with more terms, weighted in its total."""
        added = sum(added_weight(self.loss, name) * term for name, term in terms.items())
        detached = {name: term.detach() for name, term in terms.items()}
        return dataclasses.replace(
            output, total=output.total + distillation * added, terms={**output.terms, **detached}
        )


def added_names(loss: LossConfig) -> tuple[str, ...]:
    """The added terms that are on, in the order in which they are logged."""
    parts = [f"{name}_{part}" for name in SUPERVISORS for part in ("target", "nontarget")]
    features = tuple(name for name in loss.added if name != "decoupled")
    return (*(parts if loss.decoupled else ()), *features)


def added_weight(loss: LossConfig, name: str) -> float:
    """Of an added term in the total."""
    whole, _, part = name.rpartition("_")
    if whole not in SUPERVISORS:
        return getattr(loss, name)
    return getattr(loss, whole) * (loss.dkd_alpha if part == "target" else loss.dkd_beta)


def _cut(student: nn.Module) -> Stages:
    try:
        return split_stages(student)
    except UsageError as error:
        raise UsageError(
            f"loss.rkd_distance, loss.rkd_angle and loss.crd read features, and those of a "
            f"{type(student).__name__} as student are not known: expected a model of the zoo or a "
            "torchvision or timm model that is cut without --teacher.stages"
        ) from error
