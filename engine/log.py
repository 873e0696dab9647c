"""What a run leaves on disk besides checkpoints, and what it says while it goes on.

run.json        resolved configuration, versions, hardware, cost; usable as --config
metrics.csv     one row an evaluation        tensorboard/  the same figures
status.json     where the run stands         events.jsonl  what happened, one object a line
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import StorageError
from .files import write_atomically

_REFRESH_S = 0.5  # how often a progress line reads the device
_PLAIN_LINE_S = 20.0  # how often a run without a terminal says that it is alive


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "triton", "dfptkd"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this source tree, `-dirty` with uncommitted changes; None outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        top = subprocess.run(
            [*git[:3], "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        )
        if Path(top.stdout.strip()) != root:
            return None  # installed into somebody else's checkout
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run runs on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


class RunLog:
    """The files of one run folder and its voice on the terminal.

    Args:
        folder: The run folder; made if absent.
        columns: Columns of metrics.csv.
        resume_step: Step that the run goes on from: rows written after it are cut, so that none
            is doubled.
        prefix: Put before every line on the terminal.
    """

    def __init__(
        self, folder: Path, columns: Iterable[str], resume_step: int | None, prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self._status: dict[str, Any] = {}
        self._status_lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.columns = folder, list(columns)
        self.console = Console(soft_wrap=True)
        self._started = time.monotonic()
        rows = [] if resume_step is None else self._rows_until(resume_step)
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        if resume_step is None:
            (folder / "events.jsonl").unlink(missing_ok=True)
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def _rows_until(self, step: int) -> list[dict[str, str]]:
        try:
            with open(self.folder / "metrics.csv", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError:
            return []
        return [
            row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= step
        ]

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self.console.print(self.prefix + text, markup=False, highlight=False)

    def warn(self, kind: str, message: str, step: int = 0) -> None:
        """A warning: on the terminal and in events.jsonl."""
        self.say(f"warning: {message}")
        self.event(kind, message, step)

    def event(self, kind: str, message: str, step: int = 0) -> None:
        """Append to events.jsonl."""
        entry = {"time": time.time(), "step": step, "kind": kind, "message": message}
        with open(self.folder / "events.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def row(self, row: dict[str, float]) -> None:
        """Append to metrics.csv and to the TensorBoard file."""
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writerow({k: f"{v:.6g}" if k != "step" else v for k, v in row.items()})
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._tensorboard.add_scalar(name, value, row["step"])
        self._tensorboard.flush()

    def record(self, values: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", values)

    def status(self, **values: Any) -> None:
        """Replace status.json."""
        with self._status_lock:
            self._status = values
            self._write_status()

    def beat(self, phase: str) -> None:
        """Renew the time in status.json, and say what the run is at; from any thread."""
        with self._status_lock, suppress(StorageError):
            self._status |= {"phase": phase}
            self._write_status()

    def _write_status(self) -> None:
        write_json(self.folder / "status.json", {**self._status, "time": time.time()})

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._tensorboard.close()

    @contextmanager
    def progress(self, total_steps: int, done: int, batch: int) -> Iterator[ProgressLine]:
        """A bar on a terminal, a plain line now and then elsewhere."""
        # Of several runs none has a bar: a terminal has room for one.
        if self.prefix or not self.console.is_terminal:
            yield ProgressLine(None, self, total_steps, done, batch)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield ProgressLine(bar, self, total_steps, done, batch)


class SilentLog(RunLog):
    """The log of a process that leaves writing and speaking to rank 0."""

    def __init__(self) -> None:
        pass

    def say(self, text: str) -> None:
        """Nothing."""

    def event(self, kind: str, message: str, step: int = 0) -> None:
        """Nothing."""

    def row(self, row: dict[str, float]) -> None:
        """Nothing."""

    def record(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def status(self, **values: Any) -> None:
        """Nothing."""

    def beat(self, phase: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, total_steps: int, done: int, batch: int) -> Iterator[ProgressLine]:
        """A line that is never due."""
        yield SilentLine(None, self, total_steps, done, batch)


class ProgressLine:
    """Images/s, loss terms and time left, refreshed a few times a second at the most."""

    def __init__(
        self, bar: Progress | None, log: RunLog, total_steps: int, done: int, batch: int
    ) -> None:
        self.bar, self.log, self.total_steps, self.batch = bar, log, total_steps, batch
        self._shown = self._since = time.monotonic()
        self._first = done
        if bar is not None:
            self.task = bar.add_task("", total=total_steps, completed=done, figures="")

    def due(self) -> bool:
        """Whether it is time for `update`; asking is free."""
        period = _PLAIN_LINE_S if self.bar is None else _REFRESH_S
        return time.monotonic() - self._shown >= period

    def update(self, epoch: float, step: int, means: dict[str, float]) -> None:
        """Show the state after `step` steps."""
        self._shown = now = time.monotonic()
        speed = (step - self._first) * self.batch / max(now - self._since, 1e-9)
        terms = "  ".join(
            f"{k.removeprefix('loss/')} {v:.3f}" for k, v in means.items() if k.startswith("loss/")
        )
        figures = f"{speed:,.0f} images/s  {terms}"
        if self.bar is not None:
            label = f"epoch {epoch:.1f}"
            self.bar.update(self.task, completed=step, description=label, figures=figures)
            return
        left = (self.total_steps - step) * self.batch / max(speed, 1e-9)
        self.log.say(
            f"epoch {epoch:.2f}  step {step}/{self.total_steps}  {figures}  {clock(left)} left"
        )


class SilentLine(ProgressLine):
    """Of a process that leaves speaking to rank 0."""

    def due(self) -> bool:
        """Never."""
        return False


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never meets half of it."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n") and None)


def complain(message: str) -> None:
    """One line on standard error."""
    rank = os.environ.get("RANK", "0")
    print(f"dfptkd: {'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr)
