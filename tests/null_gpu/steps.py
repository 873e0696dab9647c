"""Runs training steps on the null GPU and says what each of them asked of it.

    python tests/null_gpu/steps.py < CASES        in a process that sees it (build.py)

CASES is JSON, a list of `Case`s as objects; a line of JSON comes back for each, a `Result`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import null_device
import torch

from dfptkd.engine.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.kernel_cache import Choice
from dfptkd.engine.kernel_choice import KernelChoices
from dfptkd.engine.stand_in import build_step
from dfptkd.engine.step import TrainStep
from dfptkd.kernels.backend import Call, Site
from dfptkd.recipes.arms import ARMS

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """Steps of one configuration."""

    method: str
    mode: str
    arm: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    """What else differs from the small run below, nested as in run.json."""
    backend: str = "inductor"
    """Of torch.compile; eager and aot_eager trace all the same and generate no code. none: regions
    are left as they are."""
    unfused: tuple[str, ...] = ("prompt_pair",)
    """Operations that PyTorch serves, or Inductor where it compiles them; the others are Triton's.
    The Triton kernels of pairs of prompt and fusion block take a minute to compile."""
    seeds: int = 1
    """Steps side by side."""
    label: str = ""
    """Put behind method and arm where the changes have no name of their own."""

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(part for part in (self.method, self.arm, self.label) if part)


@dataclass
class Result:
    """What happened; counts are those of the last step, of all seeds together."""

    name: str
    mode: str
    seconds: float = 0.0
    error: str | None = None
    fallback: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    nodes: int = 0
    """Of one captured step; 0 without a capture."""
    waits: int = 0
    """Calls after the first step in which the host waited for the device."""
    strays: int = 0
    """Work during a capture that it did not hold."""
    violations: list[str] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    """Torch's, and how often each was given."""
    workspaces: list[list[int]] = field(default_factory=list)
    """Of each seed's graph."""


def configuration(case: Case) -> RunConfig:
    """A small run, changed as the case says."""
    config = RunConfig(
        method=case.method,  # type: ignore[arg-type]
        student="cifar:resnet8",
        teacher=TeacherConfig(name="cifar:resnet14"),
        global_batch=16,
        device="cuda",
        data=DataConfig(name="synthetic", num_classes=10, image_size=32, limit=256),
        optim=OptimConfig(lr=1e-3),
        kernels="triton",  # by the null GPU's clock there is nothing to choose
        step=StepConfig(mode=case.mode),  # type: ignore[arg-type]
    )
    if case.arm is not None:
        config = dataclasses.replace(ARMS[case.arm](config), arm=case.arm)
    return from_dict(RunConfig, _merged(to_dict(config), case.changes))


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(values[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return {**values, **nested}


def run(case: Case, result: Result, steps: int = 4) -> None:
    """Do the steps and note what they did."""
    config = configuration(case)
    data = load_data(config.data, CUDA)
    made = [
        build_step(dataclasses.replace(config, seed=seed), data, CUDA) for seed in range(case.seeds)
    ]
    if case.seeds > 1:
        for step in made:
            step.method.share_teacher(made[0].method)
            step.run_beside_others()
    batches = train_batches(data.train, batch_size=config.global_batch, seed=0, epoch=0)
    first = next(batches)
    captured: list[list[int]] = []
    for step in made:
        before = null_device.captures()
        step(first, 0)
        captured.append(list(range(before, null_device.captures())))
    before_all = null_device.counts()
    for number in range(1, steps):
        batch = next(batches)
        before_last = null_device.counts()
        for step in made:
            step(batch, number)
    after = null_device.since(before_all)
    result.counts = null_device.since(before_last)
    result.waits = after["syncs"] + after["pageable"]
    result.fallback = made[0].fallback
    result.nodes = null_device.nodes(captured[0][-1]) if captured[0] else 0
    result.workspaces = [
        sorted(set().union(*(null_device.workspaces(i) for i in own))) for own in captured
    ]


class Log(logging.Handler):
    """Keeps what is logged as a warning, or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.lines.append(f"{record.name}: {record.getMessage().splitlines()[0]}")


def attempt(case: Case) -> Result:
    """`run`, whatever happens."""
    result = Result(case.name, case.mode)
    log, started, before = Log(), time.monotonic(), null_device.counts()
    num_violations = len(null_device.violations())
    logging.getLogger().addHandler(log)
    logging.getLogger("torch").addHandler(log)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # within torch's own modules
        try:
            torch.compiler.reset()
            run(case, result)
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
    logging.getLogger().removeHandler(log)
    logging.getLogger("torch").removeHandler(log)
    given = [f"{w.category.__name__}: {w.message}" for w in caught] + log.lines
    result.warnings = dict(Counter(line[:300] for line in given))
    result.violations = null_device.violations()[num_violations:]
    result.strays = null_device.since(before)["strays"]
    result.seconds = time.monotonic() - started
    return result


@contextmanager
def compiling_by(backend: str) -> Iterator[None]:
    """Steps that are built inside compile their regions by another backend than their own."""
    own = TrainStep._compile

    def compile_regions(step: TrainStep) -> None:
        if backend == "none":
            return
        step.method.compile_regions(fullgraph=True, dynamic=False, backend=backend)

    if backend != "inductor":
        TrainStep._compile = compile_regions  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainStep._compile = own  # type: ignore[method-assign]


@contextmanager
def unfused(operations: Sequence[str]) -> Iterator[None]:
    """Steps inside leave these operations to PyTorch."""
    own = KernelChoices._find

    def find(self: KernelChoices, site: Site, call: Call, wanted: str | None) -> Choice:
        if site.operation in operations:
            return Choice(site, 0, "reference", "left to PyTorch for this test", {})
        return own(self, site, call, wanted)

    KernelChoices._find = find  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelChoices._find = own  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_warn_always(True)  # of several cases in one process each is to warn
    for values in json.load(sys.stdin):
        case = Case(**values)
        with compiling_by(case.backend), unfused(case.unfused):
            print(json.dumps(dataclasses.asdict(attempt(case))), flush=True)
