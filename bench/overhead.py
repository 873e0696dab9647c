"""`dfptkd bench overhead`: what the prompt blocks cost beside the teacher and in the whole step.

Two sides in one process, interleaved, on the same random images: `eager` is plain PyTorch with the
frozen BatchNorms as they are, `ours` what a run takes. Times are of the parts

    teacher         original path, no gradient
    pairs           every prompt + fusion pair on its stage's output: forward, and with backward
    step            a run's own DFPT-KD step

Bytes are those that the forward pass keeps for the backward (of the pairs, of the whole prompt
path), parameters and buffers not counted. Frozen stages keep no input on either side;
tests/engine/models/test_frozen.py sets that against what autograd keeps by default. Neither data
nor weights are needed.

    dfptkd bench overhead [--teacher NAME] [--student NAME] [--image-size 32] [--batch 64]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.data import load_data, train_batches
from ..engine.memory import kept_bytes
from ..engine.models import DualPathTeacher
from ..engine.stand_in import PairCost, build_step, pair_cost
from ..engine.timing import time_interleaved
from ..kernels import use_backend
from .measure import (
    Keep,
    Row,
    bench_parser,
    keeper,
    make_row,
    peak_bytes,
    prepared_device,
)
from .step import Setting, add_pair_options, make_setting

PARTS = ("teacher", "pairs", "pairs+backward", "step")


@dataclass(frozen=True)
class Side:
    """One implementation: what is timed, and the bytes that it keeps."""

    calls: dict[str, Callable[[], object]]
    pairs_kept: int
    path_kept: int


def make_side(setting: Setting, backend: str | None) -> Side:
    """The reference with unfolded BatchNorms if `backend` says so; None: what a run takes."""
    device = setting.device
    config = setting.config("eager")
    config = replace(config, teacher=replace(config.teacher, fold_bn=backend is None))
    data = load_data(config.data, device)
    step = build_step(config, data, device)
    dual: Any = step.method.teacher
    batch = next(train_batches(data.train, batch_size=setting.batch, seed=0, epoch=0))
    images = step.normalise(batch)
    if backend is None:
        step.choose_kernels(batch)

    def served(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with step.autocast(), step.kernels.in_force():
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

    constants = [*dual.parameters(), *dual.buffers()]
    return Side(
        calls={
            "teacher": served(lambda: dual.original_path(images)),
            "pairs": served(pairs),
            "pairs+backward": served(pairs_backward),
            "step": served(lambda: step(batch, 1)),
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
    cost: PairCost

    @property
    def pair_macs(self) -> int:
        """Of all pairs, forward, one image."""
        return self.cost.teacher.block_macs

    def milliseconds(self, side: str, part: str) -> float:
        """Median time of a part."""
        return next(r.median_us / 1e3 for r in self.rows if r.provider == side and r.passes == part)


def make_sides(setting: Setting) -> dict[str, Side]:
    """Plain PyTorch, and what a run takes."""
    return {"eager": make_side(setting, "reference"), "ours": make_side(setting, None)}


def measure(setting: Setting, *, rounds: int, keep: Keep = lambda row: None) -> Overhead:
    """Both sides of every part; `keep` takes each row as soon as it is known."""
    sides = make_sides(setting)
    rows: list[Row] = []
    for part in PARTS:
        calls = {name: side.calls[part] for name, side in sides.items()}
        timings = time_interleaved(calls, setting.device, rounds=rounds, warmup=3)
        for name, timing in timings.items():
            row = make_row(
                timing,
                setting.device,
                kernel=f"overhead:{setting.teacher}>{setting.student}",
                provider=name,
                passes=part,
                contract="hot",
                shape=setting.shape,
                dtype=setting.dtype,
                bytes_moved=None,
                copy_gb_per_s=None,
                peak=peak_bytes(calls[name], setting.device),
            )
            keep(row)
            rows.append(row)
    cost = pair_cost(setting.config("eager"), setting.classes, setting.shape[2:])
    return Overhead(setting, rows, sides, cost)


def print_overhead(found: Overhead) -> None:
    """Two tables: the parts, and the prompt blocks' share."""
    from rich.console import Console
    from rich.table import Table

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
    teacher_share = found.pair_macs / found.cost.teacher.teacher_macs
    step_share = 3 * found.pair_macs / found.cost.training_macs("dfpt")
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
    add_pair_options(parser)
    options = parser.parse_args(args)
    device = prepared_device(options)
    setting = make_setting(options, options.teacher, options.student, "dfpt", device)
    found = measure(setting, rounds=options.rounds, keep=keeper(options.out))
    print_overhead(found)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
