"""`dfptkd bench data`: images a second of each loader, and how long a training step waits for it.

    dali, torchvision   the same files, boxes and order; what decodes them differs
    synthetic           images that are made up: the ceiling, what a run does if data cost nothing

First the loaders alone, interleaved; then a run's own training steps on what each of them yields.
The clock starts with the first batch, so that workers and pipelines are up. What a loader's own
threads take from a step that computes on the same cores shows in the step, not in its waiting.

    dfptkd bench data --data.root DIR [--data.name imagenet] [--loaders dali,torchvision,synthetic]
                      [--batch 64] [--workers 2] [--steps 40] [--rounds 5]
                      [--pair "torchvision:resnet34>torchvision:resnet18"] [--train-steps 30]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from ..engine.data import Batch, ImageData, epoch_rows, load_data, steps_per_epoch
from ..engine.data.file_data import SOURCES, check_loader
from ..engine.errors import UsageError
from ..engine.stand_in import build_step
from ..engine.step import TrainStep
from ..engine.timing import Timing, spread
from .measure import Keep, Row, bench_parser, keeper, make_row, positive, prepared_device
from .step import METHODS, parse_names, parse_pairs

LOADERS = ("dali", "torchvision", "synthetic")
PAIR = "torchvision:resnet34>torchvision:resnet18"


@dataclass(frozen=True)
class Setting:
    """What all loaders of one comparison share."""

    data: DataConfig
    batch: int
    steps: int
    train_steps: int
    """Training steps of a round; 0: loaders alone."""
    teacher: str
    student: str
    method: str
    device: torch.device

    def config(self, loader: str) -> RunConfig:
        """A run of this setting with a loader."""
        return RunConfig(
            method=self.method,  # type: ignore[arg-type]
            student=self.student,
            teacher=TeacherConfig(name=self.teacher),
            global_batch=self.batch,
            device=self.device.type,
            data=replace(self.data, loader=loader),
            optim=OptimConfig(lr=1e-3),
        )


class Walk:
    """A loader's training images, epoch after epoch in random order; full batches."""

    def __init__(self, data: ImageData, setting: Setting) -> None:
        self.data, self.split, self.setting = data, data.train, setting

    def rows(self, steps: int) -> list[Tensor]:
        """int64 [B], sample numbers of each of `steps` batches."""
        batch, count = self.setting.batch, len(self.split)
        per_epoch = steps_per_epoch(count, batch)
        epochs = range(-(-steps // per_epoch))
        walked = [epoch_rows(self.split, batch_size=batch, seed=0, epoch=e) for e in epochs]
        return [rows for epoch in walked for rows in epoch][:steps]

    def batches(self, steps: int) -> Iterator[Batch]:
        """One more than `steps`: the first one is there to start what makes the others."""
        rows, workers = self.rows(steps + 1), self.setting.data.workers
        return iter(self.split.stream(rows, seed=0, epoch=0, workers=workers))


def time_loading(walk: Walk) -> float:
    """Microseconds of a batch, nobody using it."""
    batches = walk.batches(walk.setting.steps)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    _wait_for(walk.setting.device)
    return (time.perf_counter() - started) / count * 1e6


def time_training(walk: Walk, step: TrainStep) -> tuple[float, float]:
    """Microseconds of a training step, and of its waiting for the batch."""
    setting, waited = walk.setting, 0.0
    batches = walk.batches(setting.train_steps)
    step(next(batches), 1)
    _wait_for(setting.device)
    started = time.perf_counter()
    for _ in range(setting.train_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch, 1)
    step.join()
    _wait_for(setting.device)
    whole = time.perf_counter() - started
    return whole / setting.train_steps * 1e6, waited / setting.train_steps * 1e6


def make_walks(setting: Setting, loaders: Sequence[str]) -> dict[str, Walk]:
    """Every loader's walk over the images."""
    loaded = {loader: load_data(setting.config(loader).data, setting.device) for loader in loaders}
    return {loader: Walk(data, setting) for loader, data in loaded.items()}


def measure(
    setting: Setting, loaders: Sequence[str], *, rounds: int, keep: Keep = lambda row: None
) -> list[Row]:
    """Rows of every loader: `loading` a batch, and the `step` and its `waiting`.

    Args:
        setting: What the loaders share.
        loaders: Their names.
        rounds: How often each is timed.
        keep: Takes the rows of loading as soon as they are known, and then those of training.
    """
    walks = make_walks(setting, loaders)
    alone: dict[str, list[float]] = {loader: [] for loader in loaders}
    for walk in walks.values():
        next(walk.batches(0))
    for _ in range(rounds):
        for loader, walk in walks.items():
            alone[loader].append(time_loading(walk))
    files = f"data:{setting.data.name}"
    rows = [_row(setting, files, name, "loading", spread(t)) for name, t in alone.items()]
    for row in rows:
        keep(row)
    training = _measure_training(setting, walks, rounds)
    for row in training:
        keep(row)
    return rows + training


def _measure_training(setting: Setting, walks: dict[str, Walk], rounds: int) -> list[Row]:
    if not setting.train_steps:
        return []
    first = next(iter(walks))
    step = build_step(setting.config(first), walks[first].data, setting.device)
    step(next(walks[first].batches(0)), 0)  # compiles and captures
    times: dict[str, list[tuple[float, float]]] = {loader: [] for loader in walks}
    for _ in range(rounds):
        for loader, walk in walks.items():
            times[loader].append(time_training(walk, step))
    kernel = f"data:{setting.method}:{setting.teacher}>{setting.student}"
    return [
        _row(setting, kernel, loader, passes, spread([t[which] for t in found]))
        for loader, found in times.items()
        for which, passes in enumerate(("step", "waiting"))
    ]


def _row(setting: Setting, kernel: str, loader: str, passes: str, timing: Timing) -> Row:
    side = setting.data.image_size
    return make_row(
        timing,
        setting.device,
        kernel=kernel,
        provider=loader,
        passes=passes,
        contract=f"{setting.data.workers} workers",
        shape=(setting.batch, 3, side, side),
        dtype=torch.uint8,
        bytes_moved=None,
        copy_gb_per_s=None,
        peak=None,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_rows(rows: Sequence[Row], setting: Setting) -> None:
    """Images a second, alone and in training, and the share of a step that waits."""
    from rich.console import Console
    from rich.table import Table

    time_of = {(row.provider, row.passes): row for row in rows}
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("loader")
    columns = ["images/s", "p20..p80", "/ torchvision"]
    if setting.train_steps:
        columns += ["training images/s", "step ms", "waits for data", "of the ceiling"]
    for column in columns:
        table.add_column(column, justify="right")
    ceiling = time_of.get(("synthetic", "step"))
    base = time_of.get(("torchvision", "loading"))

    def speed(microseconds: float) -> str:
        return f"{setting.batch / microseconds * 1e6:,.0f}"

    for loader in dict.fromkeys(row.provider for row in rows):
        row = time_of[loader, "loading"]
        cells = [
            speed(row.median_us),
            f"{speed(row.p80_us)}..{speed(row.p20_us)}",
            f"{base.median_us / row.median_us:.2f}x" if base else "",
        ]
        if setting.train_steps:
            step, waiting = time_of[loader, "step"], time_of[loader, "waiting"]
            cells += [
                speed(step.median_us),
                f"{step.median_us / 1e3:,.1f}",
                f"{100 * waiting.median_us / step.median_us:.1f} %",
                f"{100 * ceiling.median_us / step.median_us:.0f} %" if ceiling else "",
            ]
        table.add_row(loader, *cells)
    Console(width=None if Console().is_terminal else 120).print(table)
    r = rows[0]
    print(
        f"{setting.data.name}, batch {setting.batch}, {setting.data.workers} workers, "
        f"{setting.steps} batches a round, n = {r.n} rounds, {r.device}, torch {r.torch}, "
        f"commit {r.commit}"
    )


def installed() -> list[str]:
    """The loaders that are there."""
    try:
        check_loader(DataConfig(name="folder", loader="dali"))
    except UsageError:
        return [loader for loader in LOADERS if loader != "dali"]
    return list(LOADERS)


def _available(names: str | None) -> list[str]:
    """The loaders that were asked for, or those that are there."""
    if names:
        return parse_names("--loaders", names, LOADERS)
    if "dali" not in installed():
        print("DALI is not installed: torchvision and synthetic alone")
    return installed()


def _setting(options: argparse.Namespace) -> Setting:
    device = prepared_device(options)
    pairs = parse_pairs(options.pair)
    if len(pairs) != 1:
        raise UsageError(f"--pair {options.pair}: expected one TEACHER>STUDENT")
    train_steps = options.train_steps
    if train_steps is None:
        train_steps = 30 if device.type == "cuda" else 0
    return Setting(
        DataConfig(
            name=options.name,
            root=options.root,
            image_size=options.image_size,
            workers=options.workers,
        ),
        options.batch,
        options.steps,
        train_steps,
        *pairs[0],
        options.method,
        device,
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def main(args: Sequence[str]) -> int:
    """`dfptkd bench data`; returns the exit code."""
    parser = bench_parser("data", rounds=5)
    parser.add_argument("--data.root", dest="root", help="folder of images; absent: DFPTKD_DATA")
    parser.add_argument("--data.name", dest="name", default="folder", choices=SOURCES)
    parser.add_argument("--loaders", help=f"{','.join(LOADERS)}; absent: all that are installed")
    parser.add_argument("--image-size", type=positive, default=224, help="side in pixels")
    parser.add_argument("--batch", type=positive, default=64, help="images in a batch")
    parser.add_argument("--workers", type=positive, default=2, help="decoding processes or threads")
    parser.add_argument("--steps", type=positive, default=40, help="batches of a round, loading")
    parser.add_argument(
        "--train-steps", type=_count,
        help="steps of a round, training; 0: none; absent: 30 on a GPU, 0 on a CPU",
    )  # fmt: skip
    parser.add_argument("--pair", default=PAIR, help="TEACHER>STUDENT, names of models")
    parser.add_argument("--method", default="dfpt", choices=METHODS)
    options = parser.parse_args(args)
    setting = _setting(options)
    loaders = _available(options.loaders)
    rows = measure(setting, loaders, rounds=options.rounds, keep=keeper(options.out))
    print_rows(rows, setting)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
