"""Whole runs on the null GPU: what they leave on disk and what their steps asked of it.

    python tests/null_gpu/runs.py FOLDER OPTIONS       in a process that sees it (build.py)

OPTIONS is JSON, the fields of `Options`; a line of JSON comes back, a `Report`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import null_device
import torch
from safetensors.torch import save_file
from steps import Case, compiling_by, configuration, unfused

from dfptkd.engine.config import TeacherConfig
from dfptkd.engine.data import Batch
from dfptkd.engine.errors import Stopped
from dfptkd.engine.joint_step import JointStep, Part
from dfptkd.engine.metrics import EpochMeter
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep
from dfptkd.engine.train import run_seeds


@dataclass(frozen=True)
class Options:
    """Runs of one configuration, one after the other."""

    method: str = "dfpt"
    mode: str = "graph"
    arm: str | None = None
    backend: str = "none"
    """As in steps.py."""
    seeds: tuple[int, ...] = (0,)
    runs: int = 1
    """Each with a teacher of its own, in this one process."""
    stop_at: int | None = None
    """Number of the step in which a SIGTERM comes, the first time; the run is then taken up."""
    changes: dict[str, Any] = field(default_factory=dict)
    """As in steps.py."""


@dataclass
class Report:
    """What happened."""

    steps: list[int] = field(default_factory=list)
    """Steps done at the end of each run, in order of runs and seeds."""
    stopped: list[int] = field(default_factory=list)
    """Steps that were done where a run was stopped."""
    modes: list[str] = field(default_factory=list)
    """Of each step that was built."""
    waits: int = 0
    """In which the host waited for the device, in all steps but the first of each."""
    violations: list[str] = field(default_factory=list)
    strays: int = 0
    captures: int = 0
    warnings: dict[str, int] = field(default_factory=dict)
    shared_workspaces: int = 0
    """Of the graphs that two seeds' steps replay."""
    joint_workspaces: list[int] = field(default_factory=list)
    """How many each graph of several seeds' steps has."""


def watch(report: Report, options: Options) -> list[TrainStep]:
    """From now on steps note what they do; returns the list that they enter when they are built."""
    built: list[TrainStep] = []
    seen: Counter[int] = Counter()
    own_call, own_init = TrainStep.__call__, TrainStep.__init__

    def init(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        self.workspaces = set()  # type: ignore[attr-defined]
        built.append(self)

    def call(self: TrainStep, batch: Batch, step: int) -> None:
        captures, before = null_device.captures(), null_device.counts()
        own_call(self, batch, step)
        if seen[id(self)]:
            after = null_device.since(before)
            report.waits += after["syncs"] + after["pageable"]
        else:
            own = range(captures, null_device.captures())
            self.workspaces = set().union(*map(null_device.workspaces, own))  # type: ignore[attr-defined]
        seen[id(self)] += 1
        if step == options.stop_at and not report.stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    def do_all(self: JointStep, parts: list[Part]) -> None:
        captures, before = null_device.captures(), null_device.counts()
        own_run(self, parts)
        own = range(captures, null_device.captures())
        report.joint_workspaces += [len(null_device.workspaces(i)) for i in own]
        if not own:
            after = null_device.since(before)
            report.waits += after["syncs"] + after["pageable"]

    own_run = JointStep._run
    JointStep._run = do_all  # type: ignore[method-assign]
    TrainStep.__init__, TrainStep.__call__ = init, call  # type: ignore[method-assign]
    return built


def count_images() -> None:
    """From now on an epoch's meter says how many images it was given: a run takes the zero that it
    reads back for an epoch without a single finite step."""
    own_call, own_read, own_reset = TrainStep.__call__, EpochMeter.num_images, EpochMeter.reset
    own_run = JointStep._run
    given: Counter[int] = Counter()

    def call(self: TrainStep, batch: Batch, step: int) -> None:
        own_call(self, batch, step)
        given[id(self.meter)] += len(batch.labels)

    def do_all(self: JointStep, parts: list[Part]) -> None:
        own_run(self, parts)
        for part in parts:
            given[id(part.step.meter)] += len(part.batch.labels)

    def num_images(self: EpochMeter) -> int:
        own_read(self)
        return given[id(self)]

    def reset(self: EpochMeter) -> None:
        own_reset(self)
        given[id(self)] = 0

    TrainStep.__call__, JointStep._run = call, do_all  # type: ignore[method-assign]
    EpochMeter.num_images, EpochMeter.reset = num_images, reset  # type: ignore[method-assign]


def write_teacher(folder: Path, name: str) -> TeacherConfig:
    """Random weights of a teacher, as a file."""
    path = folder / "teacher.safetensors"
    tensors = create_model(name, num_classes=10).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return TeacherConfig(name=name, weights=str(path))


def work(folder: Path, options: Options) -> Report:
    """The runs; their folders are `folder`/0, 1, ..."""
    report = Report()
    built = watch(report, options)
    count_images()
    case = Case(options.method, options.mode, options.arm, options.changes, options.backend)
    with (
        warnings.catch_warnings(record=True) as caught,
        compiling_by(options.backend),
        unfused(["prompt_pair"]),
    ):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # within torch's own modules
        for number in range(options.runs):
            root = folder / str(number)
            root.mkdir(parents=True)
            made = configuration(case)
            config = dataclasses.replace(
                made,
                teacher=write_teacher(root, made.teacher.name),
                out_root=str(root),
                seeds=options.seeds,
            )
            try:
                results = run_seeds(config)
            except Stopped:
                report.stopped = [int(step.schedule.last_epoch) for step in built]
                results = run_seeds(config)
            report.steps += [result.step for result in results]
    report.modes = [step.mode for step in built]
    report.violations = null_device.violations()
    report.strays = null_device.counts()["strays"]
    report.captures = null_device.captures()
    report.warnings = dict(Counter(f"{w.category.__name__}: {w.message}"[:300] for w in caught))
    together = [step.workspaces for step in built[: len(options.seeds)]]  # type: ignore[attr-defined]
    report.shared_workspaces = sum(map(len, together)) - len(set().union(*together))
    return report


if __name__ == "__main__":
    torch.set_warn_always(True)
    options = json.loads(sys.argv[2])
    if "seeds" in options:
        options["seeds"] = tuple(options["seeds"])
    print(json.dumps(dataclasses.asdict(work(Path(sys.argv[1]), Options(**options)))))
