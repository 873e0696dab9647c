"""One teacher, two forward paths.

    original path   x -> A_1 -> ... -> A_N -> H_theta -> z_T        frozen, eval mode, no gradient
    prompt path     x -> A_1 -> (P_1, F_1) -> A_2 -> ... -> A_N -> (P_N, F_N) -> H_phi -> z_P

DFPT-KD: both paths run the same frozen stages, and A_1 (with the stem) is computed once.
DFPT-KD+: the prompt path has its own, trained copy of the stages. Structure as stated by reviews
of arXiv 2506.18244; that A_1 can be shared and that DFPT-KD+ needs a copy is inferred.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..errors import UsageError
from .prompt import PromptFusion
from .stages import Stages, split_stages


class DualPathOutput(NamedTuple):
    """Logits of both paths, [B, num_classes] each."""

    teacher_logits: Tensor
    prompt_logits: Tensor


class Trunk(nn.Module):
    """A network cut into stages, neck and head."""

    def __init__(self, split: Stages) -> None:
        super().__init__()
        self.stages = nn.ModuleList(split.stages)
        self.neck = split.neck
        self.head = split.head

    def finish(self, x: Tensor) -> Tensor:
        """From the output of stage 1 to the logits."""
        for stage in self.stages[1:]:
            x = stage(x)
        return self.head(self.neck(x))


class DualPathTeacher(nn.Module):
    """A frozen teacher with a second, trainable forward path.

    Args:
        teacher: A pre-trained classifier. It is taken over: put in eval mode, its parameters
            frozen, its in-place activations made out-of-place (both paths read the same tensors).
        prompt: Shape of prompt and fusion blocks.
        finetune_backbone: DFPT-KD+: the prompt path trains its own copy of the stages and the neck.
        at: Module paths that end a stage, for a model without stages of its own.

    Raises:
        UsageError: `prompt.insert_stages` names a stage that the teacher has not, or the model
        cannot be split.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        prompt: PromptConfig = PromptConfig(),
        finetune_backbone: bool = False,
        at: Iterable[str] | None = None,
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
        self.config = prompt
        self.original = Trunk(split)
        self.head = self._new_head()
        self.pairs = nn.ModuleDict(
            {
                f"stage{i}": PromptFusion(
                    split.channels[i - 1], prompt, post_relu=split.post_relu[i - 1]
                )
                for i in sorted(inserted)
            }
        )
        self.finetune_backbone = finetune_backbone
        # Frozen batch statistics are what `eval` means; with bn_mode="train" the frozen path
        # normalises by the batch, so it gets buffers of its own (parameters stay shared) and the
        # teacher's are left alone.
        self.copied: Trunk | None = None
        if finetune_backbone:
            self.copied = copy.deepcopy(self.original).requires_grad_(True)
        elif prompt.bn_mode == "train":
            shared = {id(p): p for p in self.original.parameters()}
            self.copied = copy.deepcopy(self.original, shared)
        if self.copied is not None:
            self.copied.head = nn.Identity()  # the prompt path ends in `self.head`
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
    def shares_first_stage(self) -> bool:
        """Whether stem and stage 1 are computed once for both paths."""
        return self.copied is None

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The copied backbone of DFPT-KD+; empty otherwise."""
        return list(self.copied.parameters()) if self.copied and self.finetune_backbone else []

    def prompt_parameters(self) -> list[nn.Parameter]:
        """phi: prompt blocks, fusion blocks and the new head."""
        return [*self.pairs.parameters(), *self.head.parameters()]

    def trained_state(self) -> dict[str, Tensor]:
        """state_dict of what training changes: everything but the original path."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("original.")}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`; missing or unknown names raise RuntimeError."""
        original = {k: v for k, v in self.state_dict().items() if k.startswith("original.")}
        self.load_state_dict({**original, **state})

    def forward(self, images: Tensor) -> DualPathOutput:  # images [B, 3, H, W], normalised
        with torch.no_grad():
            first = self.original.stages[0](images)
            teacher_logits = self.original.finish(first)
        return DualPathOutput(teacher_logits, self.prompt_path(images, first))

    def original_path(self, images: Tensor) -> Tensor:
        """Logits of the original path alone, without a graph."""
        with torch.no_grad():
            return self.original.finish(self.original.stages[0](images))

    def prompt_path(self, images: Tensor, first: Tensor | None = None) -> Tensor:
        """Logits of the prompt path alone.

        Args:
            images: [B, 3, H, W], normalised.
            first: Output of the original path's stage 1 for these images, used where the stage is
                shared.
        """
        trunk = self.copied if self.copied is not None else self.original
        x = images
        for i, stage in enumerate(trunk.stages, start=1):
            if i == 1 and self.shares_first_stage:
                if first is None:
                    with torch.no_grad():
                        first = stage(x)
                x = first
            else:
                x = stage(x)
            if f"stage{i}" in self.pairs:
                x = self.pairs[f"stage{i}"](x)
        return self.head(trunk.neck(x))

    @contextmanager
    def prompt_norms(self) -> Iterator[dict[str, Tensor]]:
        """Collects the mean of ||P_i(x_i)|| / ||x_i|| per stage from every forward pass made
        inside (M47).

        Yields:
            Stage name -> (sum of ratios, number of images), both 0-d on the device, as a [2]
            tensor.
        """
        ratios: dict[str, Tensor] = {}

        def record(name: str, x: Tensor, prompt: Tensor) -> None:
            ratio_B = prompt.float().flatten(1).norm(dim=1) / x.float().flatten(1).norm(
                dim=1
            ).clamp(min=1e-12)
            entry = torch.stack([ratio_B.sum(), ratio_B.new_tensor(len(ratio_B))]).detach()
            ratios[name] = ratios[name] + entry if name in ratios else entry

        handles = [
            pair.prompt.register_forward_hook(
                lambda _module, inputs, output, name=name: record(name, inputs[0], output)
            )
            for name, pair in self.pairs.items()
        ]
        try:
            yield ratios
        finally:
            for handle in handles:
                handle.remove()
