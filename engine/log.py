"""What a run leaves on disk besides checkpoints, and what it says while it goes on.

run.json        resolved configuration, versions, hardware, cost; usable as --config
metrics.csv     one row an evaluation        tensorboard/  the same figures
status.json     where the run stands         events.jsonl  what happened, one object a line

None of it is worth a training: where the terminal has gone, the disk under the log is full or
TensorBoard fails, that is said once, where somebody may still read it, and the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from .errors import StorageError
from .files import first_line, write_atomically

if TYPE_CHECKING:  # steps and kernels are measured where rich is not installed
    from rich.progress import Progress

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
    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        top = subprocess.run(
            [*git[:3], "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        )
        if Path(top.stdout.strip()).resolve() != root:
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
        resume_step: Step that the run goes on from: rows and events written after it are cut, so
            that none is doubled.
        prefix: Put before every line on the terminal.

    Raises:
        StorageError: The files of an earlier start cannot be rewritten.
    """

    def __init__(
        self, folder: Path, columns: Iterable[str], resume_step: int | None, prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self._status: dict[str, Any] = {}
        self._status_lock = threading.Lock()
        self.folder, self.columns = folder, list(columns)
        self._said: set[str] = set()
        from rich.console import Console

        self.console = Console(file=Terminal(self._terminal_lost), soft_wrap=True)
        self._started = time.monotonic()
        metrics, events = folder / "metrics.csv", folder / "events.jsonl"
        last = -1 if resume_step is None else resume_step
        kept = rows_until(metrics, last)
        text = self._csv(kept, header=True)
        write_atomically(metrics, lambda path: path.write_text(text, newline=""))
        cut_events(events, last)
        self._metrics, self._events = GrowingFile(metrics), GrowingFile(events)
        self._tensorboard: Any = None
        with self._tensorboard_may_fail():
            from torch.utils.tensorboard import SummaryWriter

            # One file, however often a run is started: what others have held is in metrics.csv.
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
            for row in kept:
                self._show({k: float(v) for k, v in row.items() if v})

    def _csv(self, rows: Iterable[dict[str, Any]], *, header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

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
        self._append(self._events, json.dumps(entry) + "\n")

    def row(self, row: dict[str, float]) -> None:
        """Append to metrics.csv and to the TensorBoard file."""
        cells = {k: f"{v:.6g}" if k != "step" else v for k, v in row.items()}
        self._append(self._metrics, self._csv([cells]))
        with self._tensorboard_may_fail():
            self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        """A row in TensorBoard."""
        if self._tensorboard is None:
            return
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._tensorboard.add_scalar(name, value, int(row["step"]))
        self._tensorboard.flush()

    def _append(self, file: GrowingFile, lines: str) -> None:
        error = file.append(lines)
        if error is not None:
            self._warn_once(
                f"log:{file.path.name}",
                f"{file.path}: could not be written ({first_line(error)}): its lines are held back "
                "until the disk takes them",
            )

    def _terminal_lost(self, error: Exception) -> None:
        self._warn_once(
            "terminal", f"the terminal is gone ({first_line(error)}): the run goes on unheard"
        )

    @contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """Inside, whatever TensorBoard raises ends TensorBoard alone."""
        try:
            yield
        except Exception as error:  # its writer hands on anything that its thread met
            self._tensorboard = None
            self._warn_once(
                "tensorboard",
                f"{self.folder / 'tensorboard'}: no longer written ({first_line(error)}); "
                "metrics.csv has the same figures",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.warn(kind, message)

    def record(self, values: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", values)

    def status(self, **values: Any) -> None:
        """Replace status.json."""
        with self._status_lock:
            self._status = values
            try:
                self._write_status()
            except StorageError as error:
                self._warn_once("log:status.json", f"{error}: it shows an earlier state")

    def beat(self, phase: str) -> None:
        """Renew the time in status.json, and say what the run is at; from any thread."""
        with self._status_lock, suppress(StorageError):
            self._status |= {"phase": phase}
            self._write_status()

    def _write_status(self) -> None:
        write_json(self.folder / "status.json", {**self._status, "time": time.time()})

    def close(self) -> None:
        """Close the TensorBoard file."""
        with self._tensorboard_may_fail():
            if self._tensorboard is not None:
                self._tensorboard.close()

    @contextmanager
    def progress(self, total_steps: int, done: int) -> Iterator[ProgressLine]:
        """A bar on a terminal, a plain line now and then elsewhere."""
        # Of several runs none has a bar: a terminal has room for one.
        if self.prefix or not self.console.is_terminal:
            yield ProgressLine(None, self, total_steps, done)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield ProgressLine(bar, self, total_steps, done)


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
    def progress(self, total_steps: int, done: int) -> Iterator[ProgressLine]:
        """A line that is never due."""
        yield SilentLine(None, self, total_steps, done)


class Terminal:
    """Standard output as a stream that never fails.

    Args:
        lost: Told the error once, when writing fails for the first time; from then on everything
            goes nowhere.
    """

    def __init__(self, lost: Callable[[Exception], None]) -> None:
        self._lost, self._gone = lost, False

    @property
    def encoding(self) -> str:
        """Of standard output."""
        return getattr(self._stream(), "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write, or not; characters that a terminal does not know become question marks."""
        out, encoding = self._stream(), self.encoding
        if out is not None:
            self._try(out, lambda: out.write(text.encode(encoding, "replace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        out = self._stream()
        if out is not None:
            self._try(out, out.flush)

    def isatty(self) -> bool:
        """Whether somebody looks."""
        out = self._stream()
        try:
            return out is not None and out.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Of standard output, for its width; an OSError where there is none."""
        out = self._stream()
        if out is None:
            raise OSError("no standard output")
        return out.fileno()

    def _stream(self) -> IO[str] | None:
        """Standard output as it is now; None where the process has none, or has lost it."""
        # While a bar is shown, rich puts a stream that ends here in its place.
        return None if self._gone else getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def _try(self, out: IO[str], write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:  # ValueError: closed from within
            self._gone = True
            with suppress(OSError, ValueError):
                # What is still in its buffer would otherwise fail again when the process ends.
                handle = os.open(os.devnull, os.O_WRONLY)
                os.dup2(handle, out.fileno())
                os.close(handle)
            self._lost(error)


class GrowingFile:
    """A text file that grows by whole lines only, also on a disk that is full for a while."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, ""

    def append(self, lines: str) -> OSError | None:
        """Write lines, and those that were refused before; the error if the disk refuses again."""
        self._waiting += lines
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self.path, size)  # a part of them may have found room
                raise
        except OSError as error:
            return error
        self._waiting = ""
        return None


def rows_until(path: Path, step: int) -> list[dict[str, str]]:
    """The rows of a metrics.csv up to a step, without what a crash has cut or mixed up."""
    rows: list[list[str]] = []
    for line in _whole_lines(path):
        with suppress(csv.Error):
            rows += csv.reader([line])
    header = rows[0] if rows else []
    found = [dict(zip(header, row, strict=True)) for row in rows[1:] if len(row) == len(header)]
    return [row for row in found if _is_up_to(row.get("step"), step)]


def cut_events(path: Path, step: int) -> None:
    """Leave those events of an events.jsonl that happened up to a step, whole lines only.

    Raises:
        StorageError: The disk refused; the file is as it was.
    """
    kept = []
    for line in _whole_lines(path):
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and _is_up_to(str(event.get("step")), step):
                kept.append(line + "\n")
    if path.exists():
        write_atomically(path, lambda p: p.write_text("".join(kept), encoding="utf-8"))


def _is_up_to(cell: str | None, step: int) -> bool:
    return cell is not None and cell.isdecimal() and len(cell) < 19 and int(cell) <= step


def _whole_lines(path: Path) -> list[str]:
    """Lines that end: the writer ends each one, so the rest is half of one."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip("\r") for line in text.split("\n")[:-1]]


class ProgressLine:
    """Images/s, loss terms and time left, refreshed a few times a second at the most."""

    def __init__(self, bar: Progress | None, log: RunLog, total_steps: int, done: int) -> None:
        self.bar, self.log, self.total_steps = bar, log, total_steps
        self._shown = self._since = time.monotonic()
        self._first = done
        if bar is not None:
            self.task = bar.add_task("", total=total_steps, completed=done, figures="")

    def due(self) -> bool:
        """Whether it is time for `update`; asking is free."""
        period = _PLAIN_LINE_S if self.bar is None else _REFRESH_S
        return time.monotonic() - self._shown >= period

    def left(self, step: int, pace: float) -> float:
        """Seconds by the clock to the end of the run, after `step` steps: at the pace since it was
        started, evaluations and the turns of other runs among it; before the first step at `pace`,
        steps a second."""
        if step > self._first:
            pace = (step - self._first) / max(time.monotonic() - self._since, 1e-9)
        return (self.total_steps - step) / max(pace, 1e-9)

    def update(self, epoch: float, step: int, means: dict[str, float], speed: float) -> None:
        """Show the state after `step` steps; `speed` in images a second of the run's own time."""
        self._shown = time.monotonic()
        terms = "  ".join(
            f"{k.removeprefix('loss/')} {v:.3f}" for k, v in means.items() if k.startswith("loss/")
        )
        figures = f"{speed:,.0f} images/s  {terms}"
        if self.bar is not None:
            label = f"epoch {epoch:.1f}"
            self.bar.update(self.task, completed=step, description=label, figures=figures)
            return
        left = clock(self.left(step, 0.0))
        self.log.say(f"epoch {epoch:.2f}  step {step}/{self.total_steps}  {figures}  {left} left")


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
