"""Distillation methods, one a file; `build_method` makes one from a configuration."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import RunConfig
from ..errors import UsageError
from ..models.dual_path import DualPathTeacher
from ..models.frozen import freeze
from .base import FrozenTeacherMethod, Method, StepOutput
from .combined import CombinedDistillation
from .cross_entropy import CrossEntropy
from .dfpt import DualPathDistillation, MixtureControl
from .dist import StrongTeacherDistillation
from .dkd import DecoupledDistillation
from .kd import KnowledgeDistillation

__all__ = ["Method", "StepOutput", "build_method"]

_FROZEN_TEACHER: dict[str, type[FrozenTeacherMethod]] = {
    "kd": KnowledgeDistillation,
    "dkd": DecoupledDistillation,
    "dist": StrongTeacherDistillation,
}


def build_method(
    config: RunConfig,
    student: nn.Module,
    teacher: nn.Module | None,
    labels: Tensor | None = None,
    entry: nn.Module | None = None,
) -> Method:
    """The method that `config` names, around a student and (but for `ce`) a pre-trained teacher.

    The student must exist before this call: prompt modules draw from the random stream after it,
    and embeddings after those, so that a student starts from the same weights under every method.
    `labels`, int64 [N] of the training images, are for `loss.crd`, which keeps something of each.
    `entry` is what the teacher's images pass first, where it wants them normalised otherwise.

    Raises:
        UsageError: Nothing would be trained, or what is to stand still would be; or as of
            `DualPathTeacher` and `CombinedDistillation`.
    """
    constants = () if teacher is None else teacher.parameters()
    if not {id(p) for p in student.parameters()}.isdisjoint(map(id, constants)):
        raise UsageError("student and teacher share parameters: expected two networks")
    if not any(p.requires_grad for p in student.parameters()):
        raise UsageError("student: no parameter requires grad: expected one to be trained")
    if config.method == "ce":
        return CrossEntropy(student, config.loss)
    if teacher is None:
        raise TypeError(f"method {config.method!r} takes a teacher")
    frozen = _FROZEN_TEACHER.get(config.method)
    if frozen is None and config.loss.mixture_control:
        frozen = MixtureControl
    if frozen is not None:
        network = freeze(teacher, fold=config.teacher.fold_bn)
        network = network if entry is None else nn.Sequential(entry, network)
        return frozen(student, network, config.loss)
    dual = DualPathTeacher(
        teacher,
        prompt=config.prompt,
        finetune_backbone=config.method == "dfpt_plus",
        fold_bn=config.teacher.fold_bn,
        joint=config.step.joint_paths,
        at=config.teacher.stages,
        entry=entry,
    )
    if config.loss.added:
        return CombinedDistillation(student, dual, config.loss, labels, config.seed)
    return DualPathDistillation(student, dual, config.loss)
