"""`dfptkd bench overhead`: what the prompt blocks cost beside the teacher and in the whole step.

Two sides in one process, interleaved, on the same random images: `eager` is plain PyTorch with the
frozen BatchNorms as they are, `ours` what a run takes. Times are of the parts

    teacher         original path, no gradient
    pairs           every prompt + fusion pair on its stage's output: forward, and with backward
    step            DFPT-KD step: both paths, student, loss, backward, SGD

Bytes are those that the forward pass keeps for the backward (of the pairs, of the whole prompt
path), parameters and buffers not counted. Frozen stages keep no input on either side;
tests/engine/models/test_frozen.py sets that against what autograd keeps by default. Neither data
nor weights are needed.

    dfptkd bench overhead [--teacher NAME] [--student NAME] [--image-size 32] [--batch 64]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..engine.config import LossConfig, PromptConfig, RunConfig
from ..engine.memory import kept_bytes
from ..engine.methods.dfpt import DualPathDistillation
from ..engine.models import DualPathTeacher, create_model
from ..engine.models.cost import TeacherCost, count_macs, teacher_cost, training_macs
from ..engine.train import pick_device
from ..kernels import use_backend
from .measure import (
    Row,
    append_rows,
    bench_parser,
    make_row,
    peak_bytes,
    positive,
    time_interleaved,
)

PARTS = ("teacher", "pairs", "pairs+backward", "step")


@dataclass(frozen=True)
class Side:
    """One implementation: what is timed, and the bytes that it keeps."""

    calls: dict[str, Callable[[], object]]
    pairs_kept: int
    path_kept: int


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    teacher: str
    student: str
    classes: int
    batch: int
    image_size: int
    prompt: PromptConfig
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of a run with precision "auto"."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def images(self) -> tuple[int, int, int, int]:
        """[B, 3, H, W]."""
        return self.batch, 3, self.image_size, self.image_size


def make_side(setting: Setting, backend: str | None) -> Side:
    """The reference with unfolded BatchNorms if `backend` says so; None: what a run takes."""
    torch.manual_seed(0)
    device = setting.device
    teacher = create_model(setting.teacher, num_classes=setting.classes)
    student = create_model(setting.student, num_classes=setting.classes)
    dual = DualPathTeacher(teacher, prompt=setting.prompt, fold_bn=backend is None)
    method = DualPathDistillation(student, dual, LossConfig())
    method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        [*student.parameters(), *dual.prompt_parameters()], lr=1e-3, momentum=0.9
    )
    images = torch.randn(setting.images, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(setting.classes, (setting.batch,), device=device)

    def served(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.autocast(device.type, setting.dtype, enabled=device.type == "cuda"):
                if backend is None:
                    return call()
                with use_backend(backend):
                    return call()

        return run

    inputs = _stage_outputs(dual, served(lambda: dual.prompt_path(images)))

    def pairs() -> list[Tensor]:
        return [dual.pairs[name](x) for name, x in inputs.items()]

    def pairs_backward() -> None:
        outputs = pairs()
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        for tensor in (*inputs.values(), *dual.pairs.parameters()):
            tensor.grad = None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method(images, target).total.backward()
        optimizer.step()

    constants = [*dual.parameters(), *dual.buffers()]
    return Side(
        calls={
            "teacher": served(lambda: dual.original_path(images)),
            "pairs": served(pairs),
            "pairs+backward": served(pairs_backward),
            "step": served(step),
        },
        pairs_kept=kept_bytes(served(pairs), constants),
        path_kept=kept_bytes(served(lambda: dual.prompt_path(images)), constants),
    )


def _stage_outputs(dual: DualPathTeacher, prompt_path: Callable[[], object]) -> dict[str, Tensor]:
    """What each pair reads on the prompt path; the first one's asks for no gradient there."""
    found: dict[str, Tensor] = {}
    for name, pair in dual.pairs.items():
        pair.observer = lambda x, _, name=name: found.update({name: x.detach()})
    with torch.no_grad():
        prompt_path()
    for i, (name, pair) in enumerate(dual.pairs.items()):
        pair.observer = None
        found[name].requires_grad_(i > 0)
    return found


@dataclass(frozen=True)
class Overhead:
    """All that one call measures."""

    setting: Setting
    rows: list[Row]
    sides: dict[str, Side]
    cost: TeacherCost
    step_macs: int

    @property
    def pair_macs(self) -> int:
        """Of all pairs, forward, one image."""
        return self.cost.added_macs - self.cost.head_macs

    def milliseconds(self, side: str, part: str) -> float:
        """Median time of a part."""
        return next(r.median_us / 1e3 for r in self.rows if r.provider == side and r.passes == part)


def measure(setting: Setting, *, rounds: int) -> Overhead:
    """Both sides of every part."""
    teacher = create_model(setting.teacher, num_classes=setting.classes)
    student = create_model(setting.student, num_classes=setting.classes)
    cost = teacher_cost(teacher, setting.prompt, (setting.image_size, setting.image_size))
    student_macs = count_macs(student, (1, *setting.images[1:]))
    sides = {"eager": make_side(setting, "reference"), "ours": make_side(setting, None)}
    rows = []
    for part in PARTS:
        calls = {name: side.calls[part] for name, side in sides.items()}
        timings = time_interleaved(calls, setting.device, rounds=rounds, warmup=3)
        rows += [
            make_row(
                timing,
                setting.device,
                kernel=f"overhead:{setting.teacher}>{setting.student}",
                provider=name,
                passes=part,
                contract="hot",
                shape=setting.images,
                dtype=setting.dtype,
                bytes_moved=None,
                copy_gb_per_s=None,
                peak=peak_bytes(calls[name], setting.device),
            )
            for name, timing in timings.items()
        ]
    step_macs = training_macs("dfpt", student_macs, cost)
    return Overhead(setting, rows, sides, cost, step_macs)


def print_overhead(found: Overhead) -> None:
    """Two tables: the parts, and the prompt blocks' share."""
    console = Console(width=None if Console().is_terminal else 120)
    parts = Table(box=None, header_style="bold", pad_edge=False)
    shares = Table(box=None, header_style="bold", pad_edge=False)
    parts.add_column("median ms")
    shares.add_column("share of the pairs")
    for column in ("eager", "ours", "eager / ours"):
        parts.add_column(column, justify="right")
    for column in ("FLOP %", "eager time %", "ours time %", "eager / FLOP", "ours / FLOP"):
        shares.add_column(column, justify="right")
    for part in PARTS:
        eager, ours = (found.milliseconds(side, part) for side in ("eager", "ours"))
        parts.add_row(part, f"{eager:.2f}", f"{ours:.2f}", f"{eager / ours:.2f}")
    for name in ("pairs", "path"):
        eager, ours = (getattr(side, f"{name}_kept") / 1e6 for side in found.sides.values())
        parts.add_row(
            f"MB kept by the {name}", f"{eager:.1f}", f"{ours:.1f}", f"{eager / ours:.2f}"
        )
    teacher_share = found.pair_macs / found.cost.teacher_macs
    step_share = 3 * found.pair_macs / found.step_macs
    for label, part, whole, macs in (
        ("forward, of the teacher's", "pairs", "teacher", teacher_share),
        ("with backward, of the step", "pairs+backward", "step", step_share),
    ):
        times = [
            found.milliseconds(side, part) / found.milliseconds(side, whole)
            for side in ("eager", "ours")
        ]
        shares.add_row(
            label,
            *(f"{100 * value:.1f}" for value in (macs, *times)),
            *(f"{value / macs:.1f}" for value in times),
        )
    console.print(parts)
    console.print(shares)
    r = found.rows[0]
    print(
        f"{r.kernel.removeprefix('overhead:')}, batch {found.setting.batch}, {r.device}, "
        f"{r.threads} threads, torch {r.torch}, commit {r.commit}, n = {r.n}"
    )


def main(args: Sequence[str]) -> int:
    """`dfptkd bench overhead`; returns the exit code."""
    parser = bench_parser("overhead", rounds=20)
    parser.add_argument("--teacher", default="cifar:resnet32x4", help="name of a model")
    parser.add_argument("--student", default="cifar:resnet8x4", help="name of a model")
    parser.add_argument("--classes", type=positive, default=100)
    parser.add_argument("--image-size", type=positive, default=32, help="side in pixels")
    parser.add_argument("--batch", type=positive, default=64, help="images in a step")
    parser.add_argument("--r1", type=positive, default=PromptConfig().r1)
    parser.add_argument("--fusion-groups", type=positive, default=PromptConfig().fusion_groups)
    options = parser.parse_args(args)
    setting = Setting(
        options.teacher,
        options.student,
        options.classes,
        options.batch,
        options.image_size,
        PromptConfig(r1=options.r1, fusion_groups=options.fusion_groups),
        pick_device(RunConfig(device=options.device)),
    )
    found = measure(setting, rounds=options.rounds)
    append_rows(found.rows, options.out)
    print_overhead(found)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
