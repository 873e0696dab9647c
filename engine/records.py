"""What a run has left on disk, read back: run.json, metrics.csv, status.json, events.jsonl.

A run that is still going on, or was killed, is read as far as it got: a half-written last line of a
file that grows is left out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .alarms import (
    fusion_warning,
    overhead_warnings,
    saturates_early,
    saturation_warning,
    teacher_warning,
)
from .config import RunConfig, from_dict, known_keys
from .errors import DataError, Stopped, UsageError
from .files import first_line

RUN_FORMAT = "dfptkd.run/1"
# Events that a reader of the figures must know of, with the words for them.
SIGNATURES = {
    "saturation": "saturation",
    "overhead": "overhead",
    "fusion_missing": "fusion missing",
    "teacher": "teacher",
    "teacher_at_chance": "teacher at chance",
    "teacher_below_expectation": "teacher below expectation",
    "extended": "longer than planned",
    "teacher_drift": "teacher drift",
    "loss_spike": "loss spike",
    "skipped": "skipped steps",
    "rewind": "went back",
    "quarantine": "images in quarantine",
    "passed_over": "files passed over",
    "certificate_failed": "fused kernel differs",
    "fallback": "slower steps",
    "checkpoint_failed": "checkpoint not written",
    "checkpoint_fallback": "checkpoint damaged",
}


Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # neither NaN nor infinite


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _each(kind: type | tuple[type, ...], check: Check) -> Check:
    def holds(value: Any) -> bool:
        inside = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and all(map(check, inside))

    return holds


# Keys of run.json and status.json that are read anywhere, an outer one before its inner ones: what
# each must be where it is there, and the words for it. A file of another version may lack some.
_OBJECT, _NUMBERS = (
    (_maybe(_is(dict)), "an object"),
    (_maybe(_each(dict, _maybe(_is_number))), "numbers"),
)
_NUMBER, _TEXT = (_maybe(_is_number), "a number"), (_maybe(_is(str)), "a text")
_RUN_KEYS: dict[str, tuple[Check, str]] = {
    "config.recipe": (_is(str), "a str"),
    "config.method": (_is(str), "a str"),
    "config.seed": (lambda v: type(v) is int and 0 <= v < 1 << 63, "an int"),
    "config.epochs": (_is_count, "an int of 1 or more"),
    "config.student": _TEXT,
    "config.loss": _OBJECT,
    "config.prompt": _OBJECT,
    "config.data": _OBJECT,
    "config.teacher": _OBJECT,
    "hardware": _OBJECT,
    "versions": _OBJECT,
    "cost": _NUMBERS,
    "teacher": _OBJECT,
    "teacher.name": _TEXT,
    "teacher.sha256": _TEXT,
    "teacher.top1": _NUMBER,
    "teacher.expected_top1": _NUMBER,
    "student": _OBJECT,
    "student.initial_sha256": _TEXT,
    "teacher.trained": _OBJECT,
    "extended": (_maybe(_each(list, _is(dict))), "a list of objects"),
    "not_known_from_paper": (_maybe(_each((dict, list), lambda _: True)), "an object or a list"),
    "warnings": (_maybe(_each(list, _is(str))), "a list of texts"),
    "data": _OBJECT,
    "data.name": _TEXT,
    "data.train_sha256": _TEXT,
    "data.test_sha256": _TEXT,
    "data.num_classes": (_is_count, "a number of classes"),
    "data.image_size": (_each(list, _is_count), "height and width"),
    "data.mean": (_each(list, _is_number), "a list of numbers"),
    "data.std": (_each(list, _is_number), "a list of numbers"),
    "data.class_names": (_maybe(_each(list, _is(str))), "a list of names"),
}
_STATUS_KEYS: dict[str, tuple[Check, str]] = {
    "state": _TEXT,
    "last": _NUMBERS,
    "best": _NUMBERS,
    **dict.fromkeys(("epoch", "step", "total_steps", "seconds", "images_per_second"), _NUMBER),
    **dict.fromkeys(("time", "exit_code"), _NUMBER),
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

    @cached_property
    def config(self) -> RunConfig | None:
        """The configuration; None where this version refuses a value of it.

        An option that is younger than the run has its default: what that does was done before.
        """
        try:
            return from_dict(RunConfig, known_keys(RunConfig, self.run["config"]))
        except UsageError:
            return None

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
    for key in ("recipe", "method", "seed", "epochs"):
        config.setdefault(key, None)  # refused below
    status = _read_json(folder / "status.json")
    _check(run, _RUN_KEYS, folder / "run.json")
    _check(status, _STATUS_KEYS, folder / "status.json")
    return RunRecord(
        folder=folder,
        run=run,
        status=status,
        metrics=_read_metrics(folder / "metrics.csv"),
        events=_read_events(folder / "events.jsonl"),
    )


def exit_code_of(folder: Path, since: float = 0.0) -> tuple[int, str]:
    """The exit code that a run has left with, and a line that says so: torchrun hides it.

    Args:
        folder: Of the run.
        since: Seconds since 1970: what is older is no answer.

    Raises:
        DataError: No status.json there, or one that is damaged.
    """
    path = folder / "status.json"
    status = _read_json(path)
    _check(status, _STATUS_KEYS, path)
    state, step = status.get("state"), status.get("step")
    if (status.get("time") or 0.0) < since:
        return 1, f"{folder}: not started since then; {state} at step {step} before"
    known = {"finished": 0, "stopped": Stopped.exit_code}
    code = known.get(str(state), status.get("exit_code") or 1)
    said = {"stopped": ", saved: the same command goes on", "running": ", or killed since"}
    return int(code), f"{folder}: {state} at step {step}{said.get(str(state), '')}"


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
    seen: dict[str, list[str]] = {}  # by the trainer; the record cannot show it any more
    for event in record.events:
        kind = SIGNATURES.get(str(event.get("kind")))
        if kind and kind not in known:
            seen.setdefault(kind, []).append(str(event.get("message", "")))
    for kind, said in seen.items():
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        found.append((kind, said[0] + more))
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
        for message in overhead_warnings(record.run.get("cost") or {}):
            yield "overhead", message
        if (record.run["config"].get("prompt") or {}).get("fusion") is False:
            yield "fusion missing", fusion_warning()
    if teacher is not None:
        message = teacher_warning(teacher, (record.run.get("teacher") or {}).get("expected_top1"))
        if message:
            yield "teacher below expectation", message


def _check(values: dict[str, Any], keys: dict[str, tuple[Check, str]], path: Path) -> None:
    """Refuse a file in which something that is read is not what it should be.

    Raises:
        DataError: It names the key.
    """
    for dotted, (check, expected) in keys.items():
        *outer, name = dotted.split(".")
        inside = values
        for key in outer:
            inside = inside.get(key) or {}
        if name in inside and not check(inside[name]):
            raise DataError(f"{path}: {dotted}: expected {expected}")


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
