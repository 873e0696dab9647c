"""Real steps of a run on synthetic images, in a process of its own.

`python -m dfptkd.engine.probe` reads a request from standard input and prints what it knows so far,
one JSON object a line; the last line counts.

A process of its own can be ended in the middle of a step, or of a compilation, and its peak of
memory is the run's alone. Neither data nor weights are needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import RunConfig, from_dict, to_dict
from .data import ImageData, load_data
from .machine import pick_device, prepare_torch
from .memory import process_bytes
from .metrics import normaliser
from .models.parts import eval_mode
from .stand_in import build_step
from .step import TrainStep

STEPS = 8  # timed steps that are enough,
SECONDS = 5.0  # if they took this long: a median over 8 short steps says little
LEAST_STEPS = 4
WARMUP_STEPS = 2
TRIAL_IMAGES = 8  # of the first step, which says how many images the time allows


@dataclass(frozen=True)
class Built:
    """A run, ready for its first step, on images that need no files."""

    step: TrainStep
    data: ImageData


@dataclass
class Probe:
    """What was measured; times in seconds."""

    batch: int = 0
    """Images of a step: those of the run, or as many as time and memory allowed."""
    steps: list[float] = field(default_factory=list)
    """Time of each step after the warm-up."""
    evaluation: float | None = None
    """One image through every path of an evaluation."""
    teacher: float | None = None
    """One image through the original path."""
    memory_bytes: int | None = None
    """Peak of the process beyond what it held when it had built nothing."""
    mode: str = "eager"

    @property
    def step_seconds(self) -> float:
        """Median time of a step of `batch` images."""
        return statistics.median(self.steps)


def build(config: RunConfig, device: torch.device) -> Built:
    """What `train.run` builds, of a `stand_in`, without anything on disk."""
    data = load_data(config.data, device)
    return Built(build_step(config, data, device), data)


# In the process of its own -----------------------------------------------------------------------


class Prober:
    """Takes the measurements one after the other, saying after each what is known.

    Args:
        config: A `stand_in`.
        images: Most images of a step.
        deadline: When to stop, in the time of `time.time`, which processes share.
        steps: Timed steps that are enough,
        span: if they took so many seconds together.
    """

    def __init__(
        self, config: RunConfig, images: int, deadline: float, steps: int, span: float
    ) -> None:
        self.config, self.images, self.deadline = config, images, deadline
        self.steps, self.span = steps, span
        self.device = pick_device(config)
        prepare_torch(config)
        _load_libraries(self.device)
        self.base = process_bytes("VmRSS")
        self.found = Probe()

    def run(self) -> None:
        """Build, find the batch, warm up, time the steps, time a piece of an evaluation."""
        self.built = build(self.config, self.device)
        self.found.mode = self.built.step.mode
        self.found.batch = self.choose_batch()
        call = self.stepper(self.found.batch)
        slowest = 0.0
        for _ in range(WARMUP_STEPS):
            slowest = self.clock(call)
            if 2 * LEAST_STEPS * slowest > self.left():
                break
        while not self.enough():
            if self.found.steps and self.left() < 2 * slowest:
                break
            self.found.steps.append(self.clock(call))
            slowest = max(self.found.steps)
            self.say()
        self.time_evaluation()
        self.say()

    def choose_batch(self) -> int:
        """The run's batch, or one so small that its steps fit into the time."""
        parts = self.config.accumulate
        trial = min(self.images, max(TRIAL_IMAGES, 2 * parts))
        trial -= trial % parts
        if self.built.step.mode != "eager" or trial < 2 * parts:
            return self.images  # a second size would be compiled, or captured, too
        call = self.stepper(trial)
        call()
        image_seconds = self.clock(call) / trial
        # Warm-up, the steps that must be timed, and the forward passes of an evaluation.
        affordable = int(0.9 * self.left() / ((LEAST_STEPS + 2) * image_seconds))
        if affordable >= self.images:
            return self.images
        unit = parts if affordable < 8 * parts else 8 * parts
        return max(affordable - affordable % unit, trial)

    def stepper(self, images: int) -> Callable[[], None]:
        batch = self.built.data.train.batch(torch.arange(images), seed=0, epoch=0)
        numbers = iter(range(1 << 30))
        return lambda: self.built.step(batch, next(numbers))

    def enough(self) -> bool:
        steps = self.found.steps
        return len(steps) >= self.steps and sum(steps) >= self.span

    def time_evaluation(self) -> None:
        """The forward passes of an evaluation, on one batch."""
        step, method = self.built.step, self.built.step.method
        size = min(self.config.eval_batch, self.found.batch)
        batch = self.built.data.test.batch(torch.arange(size), seed=0, epoch=0)
        normalise = normaliser(self.built.data)

        def paths() -> None:
            for network in (method.student, method.prompt_logits, step.ema):
                if network is not None:
                    network(normalise(batch))

        def teacher() -> None:
            method.teacher_logits(normalise(batch))

        with (
            torch.no_grad(),
            eval_mode(method),
            step.autocast(),
            step.plainly(),
            step.kernels.in_force(),
        ):
            for name, call in (("evaluation", paths), ("teacher", teacher)):
                call()
                setattr(self.found, name, self.clock(call) / size)

    def clock(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def left(self) -> float:
        return self.deadline - time.time()

    def say(self) -> None:
        """Print everything found so far."""
        self.found.memory_bytes = self.peak_bytes()
        print(json.dumps(dataclasses.asdict(self.found)), flush=True)

    def peak_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = process_bytes("VmHWM")
        return None if peak is None or self.base is None else peak - self.base


def _load_libraries(device: torch.device) -> None:
    """What every process loads before it builds anything, so that the peak is the run's alone."""
    import torchvision.models  # noqa: F401

    conv = nn.Conv2d(3, 8, 3).to(device)
    conv(torch.randn(2, 3, 16, 16, device=device)).mean().backward()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak of this process starts anew
    except OSError:
        pass


def main() -> int:
    """The process of its own."""
    request = json.load(sys.stdin)
    config = from_dict(RunConfig, request.pop("config"))
    Prober(config, **request).run()
    return 0


# Outside -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failed:
    """Why there is no measurement, or none of everything."""

    reason: str


def run_probe(
    config: RunConfig,
    images: int,
    seconds: float,
    *,
    steps: int = STEPS,
    span: float = SECONDS,
    environment: dict[str, str] | None = None,
) -> Probe | Failed:
    """Measure a `stand_in` in a process that is ended after `seconds`.

    Args:
        config: A `stand_in`.
        images: Most images of a step.
        seconds: For everything, the start of the process included.
        steps: Timed steps that are enough,
        span: if they took so many seconds together.
        environment: Variables of the process beside the present ones.
    """
    deadline = time.time() + seconds
    request: dict[str, Any] = {"config": to_dict(config), "images": images, "deadline": deadline}
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        text = json.dumps({**request, "steps": steps, "span": span})
        out, errors = process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        errors = f"not one step was done in {seconds:.0f} s"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if lines:
        return Probe(**json.loads(lines[-1]))
    if process.returncode == -signal.SIGKILL and not errors:
        errors = "the system ended it, which it does for want of memory"
    return Failed(errors.strip().splitlines()[-1] if errors else f"exit code {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
