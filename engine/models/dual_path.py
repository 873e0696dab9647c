"""One teacher, two forward paths.

    original path   x -> A_1 -> ... -> A_N -> H_theta -> z_T        frozen, eval mode, no gradient
    prompt path     x -> A_1 -> (P_1, F_1) -> A_2 -> ... -> A_N -> (P_N, F_N) -> H_phi -> z_P

DFPT-KD: both paths run the same frozen stages, and A_1 (with the stem) is computed once.
DFPT-KD+: the prompt path has its own, trained copy of the stages. Structure as stated by reviews
of arXiv 2506.18244; that A_1 can be shared and that DFPT-KD+ needs a copy is inferred.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..errors import UsageError
from .frozen import freeze
from .parts import pooled
from .prompt import PromptFusion
from .stages import Stages, split_stages


class DualPathOutput(NamedTuple):
    """Logits of both paths, [B, num_classes] each."""

    teacher_logits: Tensor
    prompt_logits: Tensor


class FrozenOutputs(NamedTuple):
    """What a frozen teacher makes of a batch, without a graph: all that does not depend on what is
    trained."""

    shared: Tensor | None
    """[B, C, H, W], the output of the stages that both paths of a dual-path teacher share (of none:
    the images); None where there is no prompt path."""
    logits: Tensor
    """[B, num_classes]."""

    @staticmethod
    def joined(parts: Sequence[FrozenOutputs]) -> FrozenOutputs:
        """Those of several batches, one behind the other."""
        if len(parts) == 1:
            return parts[0]
        shared = [part.shared for part in parts if part.shared is not None]
        logits = torch.cat([part.logits for part in parts])
        return FrozenOutputs(torch.cat(shared) if shared else None, logits)

    def chunk(self, parts: int) -> list[FrozenOutputs]:
        """Those of so many equal parts of the batch: views."""
        shared = [None] * parts if self.shared is None else self.shared.chunk(parts)
        return [FrozenOutputs(*pair) for pair in zip(shared, self.logits.chunk(parts), strict=True)]


class Trunk(nn.Module):
    """A network cut into stages, neck and head."""

    shared = 0
    """Stages whose output `forward` also returns."""

    def __init__(self, split: Stages) -> None:
        super().__init__()
        self.stages = nn.ModuleList(split.stages)
        self.neck = split.neck
        self.head = split.head

    def start(self, x: Tensor, stages: int) -> Tensor:
        """Output of the first `stages` stages for images x."""
        for i in range(stages):
            x = self.stages[i](x)
        return x

    def finish(self, x: Tensor, done: int) -> Tensor:
        """From the output of stage `done` to the logits."""
        for i in range(done, len(self.stages)):
            x = self.stages[i](x)
        return self.head(self.neck(x))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # [B, 3, H, W], normalised
        """Output of the first `shared` stages (of none: the images), and the logits."""
        x = self.start(images, self.shared)
        return x, self.finish(x, self.shared)


def _frozen(split: Stages, fold: bool) -> Trunk:
    """The original path; its head stays ordinary, as the prompt path's head is a copy of it."""
    stages = [freeze(stage, fold=fold) for stage in split.stages]
    return Trunk(dataclasses.replace(split, stages=stages, neck=freeze(split.neck, fold=fold)))


class DualPathTeacher(nn.Module):
    """A frozen teacher with a second, trainable forward path.

    Args:
        teacher: A pre-trained classifier. It is taken over: put in eval mode, its parameters
            frozen, its in-place activations made out-of-place (both paths read the same tensors).
        prompt: Shape of prompt and fusion blocks.
        finetune_backbone: DFPT-KD+: the prompt path trains its own copy of the stages and the neck.
        fold_bn: Multiply the frozen BatchNorms into the convolutions before them. Without, the
            original path has the bits of the unsplit teacher in fp32.
        joint: Run the frozen stages after the first pair once, on the batches of both paths
            together: half the calls, while the input gradient of the original half is computed in
            vain. For batches so small that a call costs more than its arithmetic.
        at: Module paths that end a stage, for a model without stages of its own.
        entry: What the images pass before the first stage of either path; absent: nothing.

    Raises:
        UsageError: `joint` with a copied backbone, `prompt.insert_stages` names a stage that the
        teacher has not or that gives no maps, or the model cannot be split.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        prompt: PromptConfig = PromptConfig(),
        finetune_backbone: bool = False,
        fold_bn: bool = True,
        joint: bool = False,
        at: Iterable[str] | None = None,
        entry: nn.Module | None = None,
    ) -> None:
        super().__init__()
        teacher.eval().requires_grad_(False)
        for module in teacher.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        split = split_stages(teacher, at)
        num_stages = len(split.stages)
        inserted = (
            range(1, num_stages + 1) if prompt.insert_stages == "all" else prompt.insert_stages
        )
        if max(inserted) > num_stages:
            raise UsageError(
                f"prompt.insert_stages={tuple(inserted)}: expected stages of 1..{num_stages}"
            )
        for number in inserted:
            if not split.is_map[number - 1]:
                raise UsageError(
                    f"stage {number} of {type(teacher).__name__} returns tokens [B, T, C], and "
                    "prompt blocks convolve maps [B, C, H, W]: expected other --teacher.stages, or "
                    "a method without prompt blocks (kd, dkd, dist)"
                )
        self.config, self.width = prompt, split.width
        trunk = Trunk(split)
        self.original = _frozen(split, fold_bn)
        self.head = self._new_head()
        self.pairs = nn.ModuleDict(
            {
                f"stage{i}": PromptFusion(
                    split.channels[i - 1], prompt, post_relu=split.post_relu[i - 1]
                )
                for i in sorted(inserted)
            }
        )
        self.inserted = tuple(sorted(inserted))
        self.finetune_backbone = finetune_backbone
        # Frozen batch statistics are what `eval` means; with bn_mode="train" the frozen path
        # normalises by the batch, so it gets buffers of its own (parameters stay the teacher's).
        self.copied: Trunk | None = None
        if finetune_backbone:
            self.copied = copy.deepcopy(trunk).requires_grad_(True)
        elif prompt.bn_mode == "train":
            self.copied = copy.deepcopy(trunk, {id(p): p for p in trunk.parameters()})
        if self.copied is not None:
            self.copied.head = nn.Identity()  # the prompt path ends in `self.head`
        if joint and self.copied is not None:
            raise UsageError("joint paths: expected a frozen backbone in eval mode (dfpt)")
        self.joint = joint
        if entry is not None:
            for path in (self.original, self.copied):
                if path is not None:
                    path.stages[0] = nn.Sequential(entry, path.stages[0])
        self.original.shared = self.shared_stages
        self.train()

    def _new_head(self) -> nn.Module:
        head = copy.deepcopy(self.original.head).requires_grad_(True)
        if self.config.init == "random":
            for module in head.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return head

    def train(self, mode: bool = True) -> DualPathTeacher:
        """Training mode for the prompt path alone; the original path stays in eval mode."""
        super().train(mode)
        self.original.eval()
        if self.copied is not None:
            self.copied.train(mode and self.config.bn_mode != "eval")
        return self

    @property
    def shared_stages(self) -> int:
        """Stages that are computed once for both paths: up to the first pair; none with a copy."""
        return min(self.inserted) if self.copied is None else 0

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The copied backbone of DFPT-KD+; empty otherwise."""
        return list(self.copied.parameters()) if self.copied and self.finetune_backbone else []

    def prompt_parameters(self) -> list[nn.Parameter]:
        """phi: prompt blocks, fusion blocks and the new head."""
        return [*self.pairs.parameters(), *self.head.parameters()]

    def trained_buffers(self) -> list[Tensor]:
        """Buffers that a forward pass may move: those of everything but the original path."""
        return [b for module in self.trained_networks() for b in module.buffers()]

    def trained_networks(self) -> list[nn.Module]:
        """Everything but the original path."""
        networks = (self.pairs, self.head, self.copied)
        return [network for network in networks if network is not None]

    def trained_state(self) -> dict[str, Tensor]:
        """state_dict of what training changes: everything but the frozen teacher."""
        copied = [] if self.copied is None or self.finetune_backbone else self.copied.parameters()
        frozen = {id(p) for p in copied}
        state = self.state_dict(keep_vars=True)
        return {
            k: v.detach()
            for k, v in state.items()
            if not k.startswith("original.") and id(v) not in frozen
        }

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`; missing or unknown names raise RuntimeError."""
        trained = self.trained_state()
        frozen = {k: v for k, v in self.state_dict().items() if k not in trained}
        self.load_state_dict({**state, **frozen})  # whatever `state` says of the teacher

    def frozen_outputs(self, images: Tensor) -> FrozenOutputs | None:
        """The original path: what `forward` would compute without a graph; None where it computes
        both paths as one batch. Images [B, 3, H, W], normalised."""
        if self.joint:
            return None
        with torch.no_grad():
            return FrozenOutputs(*self.original(images))

    def frozen_start(self, images: Tensor) -> Tensor | None:
        """`shared` of the `frozen_outputs` of images [B, 3, H, W]: with a copy the images."""
        if self.joint:
            return None
        with torch.no_grad():
            return self.original.start(images, self.shared_stages)

    def frozen_logits(self, shared: Tensor) -> Tensor:
        """The logits [B, num_classes] of `frozen_outputs`, from its `shared` on."""
        with torch.no_grad():
            if not self.shared_stages:
                return self.original(shared)[1]  # the region that may be compiled
            return self.original.finish(shared, self.shared_stages)

    def forward(self, images: Tensor, frozen: FrozenOutputs | None = None) -> DualPathOutput:
        """Logits of both paths.

        Args:
            images: [B, 3, H, W], normalised.
            frozen: `frozen_outputs` of the images, where they are known already.
        """
        frozen = self.frozen_outputs(images) if frozen is None else frozen
        if frozen is None:
            return DualPathOutput(*self.both_paths(images))
        assert frozen.shared is not None
        return DualPathOutput(frozen.logits, self.continue_from(frozen.shared))

    def both_paths(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the original and of the prompt path, as one batch of twice the size."""
        trunk, count = self.original, len(images)
        with torch.no_grad():
            original = trunk.start(images, self.shared_stages)
        x = original

        def together(frozen: nn.Module) -> tuple[Tensor, Tensor]:
            both = frozen(torch.cat([original, x]))
            return both[:count].detach(), both[count:]

        for i, stage in enumerate(trunk.stages, start=1):
            if i > self.shared_stages:
                original, x = together(stage)
            if i in self.inserted:
                x = self.pairs[f"stage{i}"](x)
        original, x = together(trunk.neck)
        with torch.no_grad():
            teacher_logits = trunk.head(original)
        return teacher_logits, self.head(x)

    def original_path(self, images: Tensor) -> Tensor:
        """Logits of the original path alone, without a graph."""
        with torch.no_grad():
            return self.original.finish(images, 0)

    def prompt_path(self, images: Tensor) -> Tensor:
        """Logits of the prompt path alone; images [B, 3, H, W], normalised."""
        with torch.no_grad():
            shared = self.original.start(images, self.shared_stages)
        return self.continue_from(shared)

    def with_features(
        self, images: Tensor, frozen: FrozenOutputs | None = None
    ) -> tuple[DualPathOutput, Tensor]:
        """As `forward`, but never joint; and the prompt path's features [B, C]: see `pooled`."""
        if frozen is None:
            with torch.no_grad():
                frozen = FrozenOutputs(*self.original(images))
        assert frozen.shared is not None
        prompt_logits, features = self.continue_with_features(frozen.shared)
        return DualPathOutput(frozen.logits, prompt_logits), features

    def continue_from(self, x: Tensor) -> Tensor:
        """The prompt path from the output of the shared stages on (of none: the images)."""
        return self.head(self._to_the_head(x))

    def continue_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `continue_from`: logits, and pooled features."""
        x = self._to_the_head(x)
        return self.head(x), pooled(x)

    def _to_the_head(self, x: Tensor) -> Tensor:
        trunk = self.copied if self.copied is not None else self.original
        for i, stage in enumerate(trunk.stages, start=1):
            if i > self.shared_stages:
                x = stage(x)
            if i in self.inserted:
                x = self.pairs[f"stage{i}"](x)
        return trunk.neck(x)

    def compile_paths(self, **options: Any) -> None:
        """Compile each path as one region; `options` as of `torch.compile`."""
        self.original.compile(**options)
        for name in ("both_paths", "continue_from", "continue_with_features"):
            written = getattr(type(self), name).__get__(self)  # not what was compiled before
            setattr(self, name, torch.compile(written, **options))

    @contextmanager
    def prompt_norms(self) -> Iterator[dict[str, Tensor]]:
        """Collects ||P_i(x_i)|| / ||x_i|| of every image in the forward pass made inside (M47).

        Yields:
            Stage name -> [B], fp32, on the device.
        """
        ratios: dict[str, Tensor] = {}

        def record(name: str, x: Tensor, prompt: Tensor) -> None:
            norm = x.float().flatten(1).norm(dim=1).clamp(min=1e-12)
            ratios[name] = (prompt.float().flatten(1).norm(dim=1) / norm).detach()

        for name, pair in self.pairs.items():
            pair.observer = functools.partial(record, name)  # type: ignore[assignment]
        try:
            yield ratios
        finally:
            for pair in self.pairs.values():
                pair.observer = None  # type: ignore[assignment]
