"""What a run has left on disk, read back: run.json, metrics.csv, status.json, events.jsonl.

A run that is still going on, or was killed, is read as far as it got: a half-written last line of a
file that grows is left out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .alarms import (
    fusion_warning,
    overhead_warning,
    saturates_early,
    saturation_warning,
    teacher_warning,
)
from .errors import DataError
from .files import first_line

RUN_FORMAT = "dfptkd.run/1"
# Events that tell of a failure signature, with the words for it; the others tell what happened.
SIGNATURES = {
    "saturation": "saturation",
    "overhead": "overhead",
    "fusion_missing": "fusion missing",
    "teacher_below_expectation": "teacher below expectation",
}


@dataclass(frozen=True)
class RunRecord:
    """One run folder."""

    folder: Path
    run: dict[str, Any]
    """run.json"""
    status: dict[str, Any]
    """status.json"""
    metrics: list[dict[str, float]]
    """Rows of metrics.csv, an empty cell left out."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl."""

    @property
    def recipe(self) -> str:
        """The recipe's name; a teacher's training is no row of its recipe's comparison."""
        config = self.run["config"]
        is_teacher = config.get("role") == "teacher"
        return f"{config['recipe']} (teacher)" if is_teacher else config["recipe"]

    @property
    def method(self) -> str:
        return self.run["config"]["method"]

    @property
    def seed(self) -> int:
        return self.run["config"]["seed"]

    @property
    def finished(self) -> bool:
        return self.status.get("state") == "finished"

    @property
    def has_prompt_path(self) -> bool:
        """Whether the run trained prompt blocks (the mixture control arm does not)."""
        control = (self.run["config"].get("loss") or {}).get("mixture_control", False)
        return self.method in ("dfpt", "dfpt_plus") and not control

    def series(self, column: str) -> list[tuple[float, float]]:
        """(epochs completed, value) of a column of metrics.csv; empty where it does not apply."""
        return [(row["epoch"], row[column]) for row in self.metrics if column in row]

    def last(self, name: str) -> float | None:
        """A test accuracy after the last epoch, in percent: student_top1, prompt_top1, ..."""
        value = (self.status.get("last") or {}).get(name)
        if value is None:
            value = next((v for _, v in reversed(self.series(f"test/{name}"))), None)
        return value

    @property
    def best_student_top1(self) -> float | None:
        """The highest student accuracy of any evaluated epoch, in percent."""
        value = (self.status.get("best") or {}).get("student_top1")
        if value is None:
            value = max((v for _, v in self.series("test/student_top1")), default=None)
        return value

    @property
    def teacher_top1(self) -> float | None:
        """The teacher's test accuracy in percent, None for a run without teacher."""
        value = (self.run.get("teacher") or {}).get("top1")
        return self.last("teacher_top1") if value is None else value


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        DataError: a file is missing or corrupt; one line names it.
    """
    run = _read_json(folder / "run.json")
    config = run.get("config")
    if run.get("format") != RUN_FORMAT or not isinstance(config, dict):
        raise DataError(f"{folder / 'run.json'}: not a run record: expected format {RUN_FORMAT!r}")
    for key, kind in (("recipe", str), ("method", str), ("seed", int), ("epochs", int)):
        if not isinstance(config.get(key), kind):
            raise DataError(f"{folder / 'run.json'}: config.{key}: expected a {kind.__name__}")
    return RunRecord(
        folder=folder,
        run=run,
        status=_read_json(folder / "status.json"),
        metrics=_read_metrics(folder / "metrics.csv"),
        events=_read_events(folder / "events.jsonl"),
    )


def find_runs(folder: Path) -> list[Path]:
    """The run folders in `folder`: itself, or those below it, in alphabetical order.

    Raises:
        DataError: there are none.
    """
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.rglob("run.json"))
    if not found:
        raise DataError(f"{folder}: no run found: expected a folder with a run.json in it or below")
    return found


def failure_signatures(record: RunRecord) -> list[tuple[str, str]]:
    """(kind, message) of each failure signature of a run, computed anew where it can be."""
    found = list(_computed_signatures(record))
    known = {kind for kind, _ in found}
    for event in record.events:  # what the trainer saw and the record cannot show any more
        kind = SIGNATURES.get(str(event.get("kind")))
        if kind and kind not in known:
            known.add(kind)
            found.append((kind, str(event.get("message", ""))))
    messages = {message for _, message in found}
    found += [("note", str(w)) for w in record.run.get("warnings") or [] if w not in messages]
    return found


def _computed_signatures(record: RunRecord) -> Iterator[tuple[str, str]]:
    teacher, epochs = record.teacher_top1, record.run["config"]["epochs"]
    if record.has_prompt_path:
        if teacher is not None:
            epoch = saturates_early(record.series("test/prompt_top1"), teacher, epochs)
            if epoch is not None:
                yield "saturation", saturation_warning(epoch, epochs)
        cost = record.run.get("cost") or {}
        for key, what in (("params", "parameters"), ("macs", "MACs")):
            added, base = cost.get(f"added_{key}"), cost.get(f"teacher_{key}")
            message = overhead_warning(added, base, what) if added and base else None
            if message:
                yield "overhead", message
        if (record.run["config"].get("prompt") or {}).get("fusion") is False:
            yield "fusion missing", fusion_warning()
    if teacher is not None:
        message = teacher_warning(teacher, (record.run.get("teacher") or {}).get("expected_top1"))
        if message:
            yield "teacher below expectation", message


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: missing: expected in every run folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: corrupt at line {error.lineno}: expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _complete_lines(text: str) -> list[str]:
    """Lines that end: the writer ends each one, so the rest is still being written."""
    return [line for line in text.split("\n")[:-1] if line.strip()]


def _read_metrics(path: Path) -> list[dict[str, float]]:
    lines = _complete_lines(_read_text(path))
    if not lines:
        return []
    header, *rows = csv.reader(lines)
    if "epoch" not in header:
        raise DataError(f"{path}: corrupt at line 1: expected a column 'epoch'")
    metrics = []
    for number, cells in enumerate(rows, start=2):
        try:
            row = {n: float(c) for n, c in zip(header, cells, strict=True) if c}
            metrics.append({n: v for n, v in row.items() if not math.isnan(v)})
            row["epoch"]
        except (ValueError, KeyError):
            raise DataError(
                f"{path}: corrupt at line {number}: expected {len(header)} numbers"
            ) from None
    return metrics


def _read_events(path: Path) -> list[dict[str, Any]]:
    if not path.exists():  # nothing has happened yet
        return []
    events = []
    for number, line in enumerate(_complete_lines(_read_text(path)), start=1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise DataError(f"{path}: corrupt at line {number}: expected a JSON object")
        events.append(event)
    return events
