"""What the trainer asks of a distillation method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import LossConfig, OptimConfig
from ..models.dual_path import FrozenOutputs

Factor = float | Tensor


class Samples(NamedTuple):
    """Which images a batch is made of, for a method that keeps something of each."""

    indices: Tensor
    """int64 [B], numbers within the training split."""
    step: Tensor
    """0-d int64, on the device: number of the step."""


class BankRows(NamedTuple):
    """What a method is to keep of images, once the step has passed."""

    indices: Tensor
    """int64 [B], numbers within the training split."""
    student: Tensor
    """[B, d], without a graph."""
    supervisor: Tensor
    """[B, d], without a graph."""


@dataclass
class StepOutput:
    """Result of one forward pass of a method."""

    total: Tensor
    """0-d, what backward starts from."""
    terms: dict[str, Tensor]
    """Unweighted mean of each loss term, 0-d, detached."""
    student_correct: Tensor
    """0-d int64."""
    prompt_correct: Tensor | None = None
    """0-d int64; None without a prompt path."""
    rows: BankRows | None = None
    """Of a method that takes samples."""


class Method(nn.Module):
    """A student, what teaches it, and their losses.

    A method is called with normalised images [B, 3, H, W], labels int64 [B] and `distillation`,
    the factor in [0, 1] by which the warm-up scales every term that is no label cross-entropy: a
    number, or a 0-d tensor on the device where compiled code or a CUDA graph must not depend on it.
    One that `takes_samples` is called with `Samples` too, and told afterwards what to `remember`.
    """

    term_names: tuple[str, ...] = ()
    operation: str | None = None
    """The fused loss that the method calls, if one."""
    takes_samples = False

    def __init__(self, student: nn.Module, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss

    def frozen_outputs(self, images: Tensor) -> FrozenOutputs | None:
        """What the frozen teacher makes of images [B, 3, H, W], for `forward`; None where nothing
        can be computed apart from the rest."""
        return None

    def frozen_start(self, images: Tensor) -> Tensor | None:
        """The part of `frozen_outputs` that is needed where its logits are known: its `shared`, or
        the images, [B, C, H, W], without a graph; None as there."""
        return None

    def frozen_logits(self, start: Tensor) -> Tensor:
        """The rest of `frozen_outputs`: logits [B, num_classes], without a graph."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        distillation: Factor = 1.0,
        *,
        frozen: FrozenOutputs | None = None,
    ) -> StepOutput:
        """One forward pass of every network and all loss terms.

        Args:
            images: [B, 3, H, W], normalised.
            target: int64 [B].
            distillation: Warm-up factor.
            frozen: `frozen_outputs` of the images, where they are known already.
        """
        return self.losses(*self.all_logits(images, frozen), target, distillation)

    def example(self, images: Tensor) -> tuple[Any, ...]:
        """Arguments of a call on images [B, 3, H, W], all of class 0, to try whether it works."""
        zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        samples = (Samples(zeros, zeros.sum()),) if self.takes_samples else ()
        return images, zeros, 1.0, *samples

    def remember(self, rows: BankRows, passes: Tensor) -> None:
        """Keep the `rows` of a step, of all parts and processes, if it passes (0-d bool)."""
        raise NotImplementedError

    def all_logits(self, images: Tensor, frozen: FrozenOutputs | None = None) -> tuple[Tensor, ...]:
        """Logits [B, C] of every network, in the order that `losses` takes them."""
        raise NotImplementedError

    def losses(self, *logits_target_distillation: Any) -> StepOutput:
        """All loss terms from logits, labels and the warm-up factor."""
        raise NotImplementedError

    def prompt_logits(self, images: Tensor) -> Tensor | None:
        """Logits [B, C] of the prompt path; None for a method that has none."""
        return None

    def teacher_logits(self, images: Tensor) -> Tensor | None:
        """Logits [B, C] of the frozen teacher, without a graph; None for a method that has none."""
        return None

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Optimiser groups; each has a `name` and its own learning rate."""
        return [{"name": "student", "params": list(self.student.parameters()), "lr": optim.lr}]

    def compile_regions(self, **options: Any) -> None:
        """Compile each network and the losses as a region; `options` as of `torch.compile`, with
        `disable=True` everything is as it was."""
        self.student.compile(**options)
        losses = type(self).losses.__get__(self)  # not the one that was compiled before
        self.losses = torch.compile(losses, **options)  # type: ignore[method-assign]

    def frozen_teacher(self) -> nn.Module | None:
        """What must be the same at the end of a run as at its beginning."""
        return None

    def share_teacher(self, other: Method) -> None:
        """Hold the frozen teacher of `other`, an equal one, in place of one's own."""

    def trained_networks(self) -> list[nn.Module]:
        """Everything that runs in training mode."""
        return [self.student]

    def trained_buffers(self) -> list[Tensor]:
        """Buffers that a forward pass in training mode moves: statistics of BatchNorms."""
        return list(self.student.buffers())

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; the frozen teacher is not part of it."""
        return {f"student.{k}": v for k, v in self.student.state_dict().items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`; missing or unknown names raise RuntimeError."""
        self.student.load_state_dict(below("student.", state))


class FrozenTeacherMethod(Method):
    """A method whose teacher only supplies logits."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: LossConfig) -> None:
        super().__init__(student, loss)
        self.teacher = teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTeacherMethod:
        """Training mode for the student alone."""
        super().train(mode)
        self.teacher.eval()
        return self

    def compile_regions(self, **options: Any) -> None:
        super().compile_regions(**options)
        self.teacher.compile(**options)

    def frozen_teacher(self) -> nn.Module | None:
        return self.teacher

    def share_teacher(self, other: Method) -> None:
        assert isinstance(other, FrozenTeacherMethod)
        self.teacher = other.teacher

    def frozen_outputs(self, images: Tensor) -> FrozenOutputs:
        return FrozenOutputs(None, self.teacher_logits(images))

    def frozen_start(self, images: Tensor) -> Tensor:
        return images

    def frozen_logits(self, start: Tensor) -> Tensor:
        return self.teacher_logits(start)

    def all_logits(self, images: Tensor, frozen: FrozenOutputs | None = None) -> tuple[Tensor, ...]:
        frozen = self.frozen_outputs(images) if frozen is None else frozen
        return self.student(images), frozen.logits

    def teacher_logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(images)


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries under `prefix`, with it taken off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
