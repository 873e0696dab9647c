"""Parameters and MACs of a dual-path teacher and of a training step, counted on meta tensors.

MACs come from torch's FlopCounterMode (2 FLOP a MAC; convolutions and matrix products) on eager
modules, so nothing is read, allocated or run. Formulas of a step (forward 1, input gradient 1,
weight gradient 1):

    ce          3 M_S
    kd family   M_T + 3 M_S
    dfpt        M_T + 3 M_S + 2 (M_T - M_A1 - M_H) + 3 M_phi    frozen: forward, input gradient
    dfpt_plus   M_T + 3 M_S + 3 (M_T - M_H) + 3 M_phi           copied: all three

They charge an input gradient to every convolution; autograd leaves it out where nothing asks for
it (at the images and at the frozen output of stage 1), so a step costs a little less.

*Our reading* of the paper, whose own cost table is not known to us.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import PromptConfig
from .dual_path import DualPathTeacher
from .fit import meta_twin, same_random_numbers


def count_params(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one eval-mode forward pass on an input of `shape`.

    On tensors without memory; a module whose code needs values makes the pass for real, on a copy.
    """
    with same_random_numbers():
        try:
            return _count(meta_twin(module), torch.empty(shape, device="meta"))
        except Exception:  # of foreign code
            return _count(copy.deepcopy(module), torch.zeros(shape))


def _count(twin: nn.Module, x: Tensor) -> int:
    """`count_macs` of a copy; the counter follows no parameter that asks for a gradient."""
    twin.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(x)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class TeacherCost:
    """Cost of a teacher and of what a prompt path adds to it, 0 without one; MACs for one image."""

    teacher_params: int
    teacher_macs: int
    shared_macs: int = 0
    head_macs: int = 0
    prompt_params: int = 0
    fusion_params: int = 0
    new_head_params: int = 0
    added_macs: int = 0

    @property
    def has_prompt_path(self) -> bool:
        """Whether one is counted."""
        return self.prompt_params > 0

    @property
    def block_params(self) -> int:
        """Parameters of prompt and fusion blocks."""
        return self.prompt_params + self.fusion_params

    @property
    def block_macs(self) -> int:
        """MACs of prompt and fusion blocks."""
        return self.added_macs - self.head_macs

    @property
    def added_params(self) -> int:
        """Parameters of prompt blocks, fusion blocks and the new head."""
        return self.block_params + self.new_head_params

    @property
    def params_overhead_percent(self) -> float:
        """Added parameters over the teacher's."""
        return 100 * self.added_params / self.teacher_params

    @property
    def macs_overhead_percent(self) -> float:
        """Added MACs over the teacher's forward pass."""
        return 100 * self.added_macs / self.teacher_macs

    def record(self) -> dict[str, float]:
        """The entry "cost" of run.json: the new head among what is added, and apart."""
        teacher = {"teacher_params": self.teacher_params, "teacher_macs": self.teacher_macs}
        if not self.has_prompt_path:
            return teacher
        return teacher | {
            "added_params": self.added_params,
            "added_macs": self.added_macs,
            "new_head_params": self.new_head_params,
            "new_head_macs": self.head_macs,
            "params_overhead_percent": self.params_overhead_percent,
            "macs_overhead_percent": self.macs_overhead_percent,
        }


def teacher_cost(
    teacher: nn.Module,
    prompt: PromptConfig | None,
    image_size: tuple[int, int],
    *,
    at: tuple[str, ...] | None = None,
) -> TeacherCost:
    """Count a teacher with the prompt path that `prompt` would give it; the teacher is not touched.

    Args:
        teacher: Classifier of [B, 3, H, W] images.
        prompt: Shape of the blocks; None: the teacher alone, which then may be any classifier.
        image_size: H, W in pixels.
        at: Module paths that end a stage.

    Raises:
        UsageError: There is to be a prompt path, and the teacher cannot be cut.
    """
    shape = (1, 3, *image_size)
    alone = TeacherCost(count_params(teacher), count_macs(teacher, shape))
    if prompt is None:
        return alone
    with torch.random.fork_rng(devices=[]):  # new blocks draw; a caller's seeds must not notice
        dual = DualPathTeacher(meta_twin(teacher), prompt=prompt, at=at).to("meta").eval()
    with torch.no_grad():
        x = torch.empty(shape, device="meta")
        shared_macs = 0
        pair_macs = 0
        for i, stage in enumerate(dual.original.stages, start=1):
            if i <= dual.shared_stages:
                shared_macs += count_macs(stage, tuple(x.shape))
            x = stage(x)
            if f"stage{i}" in dual.pairs:
                pair_macs += count_macs(dual.pairs[f"stage{i}"], tuple(x.shape))
        features = dual.original.neck(x)
    head_macs = count_macs(dual.original.head, tuple(features.shape))
    return replace(
        alone,
        shared_macs=shared_macs,
        head_macs=head_macs,
        prompt_params=sum(count_params(pair.prompt) for pair in dual.pairs.values()),
        fusion_params=sum(count_params(pair.fusion) for pair in dual.pairs.values()),
        new_head_params=count_params(dual.head),
        added_macs=pair_macs + head_macs,
    )


def training_macs(method: str, student_macs: int, cost: TeacherCost | None) -> int:
    """MACs of one training step for one image, by the formulas at the top of this file."""
    macs = 3 * student_macs
    if method == "ce" or cost is None:
        return macs
    macs += cost.teacher_macs
    if method == "dfpt":
        frozen = cost.teacher_macs - cost.shared_macs - cost.head_macs
        macs += 2 * frozen + 3 * cost.added_macs
    elif method == "dfpt_plus":
        macs += 3 * (cost.teacher_macs - cost.head_macs) + 3 * cost.added_macs
    return macs
