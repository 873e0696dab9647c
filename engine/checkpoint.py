"""Checkpoints: one folder a step, complete or absent, without pickle.

    checkpoints/step-<N>/state.safetensors   every tensor of the run, by name
                         state.json          every number and text of the run
                         manifest.json       size and SHA-256 of the two, written last
    checkpoints/index.json                   {"last": "step-<N>", "best": "step-<M>"}, hints only

A checkpoint is written to a temporary folder, flushed and renamed: a crash leaves the previous one.
`remove_leftovers` clears away, at the next start, what it leaves beside.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import DataError, StorageError
from .files import (
    disk_errors,
    first_line,
    flush,
    read_json,
    read_tensors,
    remove_temporary,
    save_file,
    write_atomically,
)

STATE_FILES = ("state.safetensors", "state.json")
FILES = (*STATE_FILES, "manifest.json")
# What every state must hold to be gone on from; a run stores more.
STATE_KINDS: dict[str, type] = {
    "step": int, "progress": dict, "scaler": dict, "alarmed": bool, "data": dict, "config": dict,
}  # fmt: skip
# Free space to ask for, over the size of the files: the file system takes some for itself.
SPACE_FACTOR = 1.2
_PROBE_BYTES = 1 << 22
RETRY_AFTER_S = (0.5, 2.0)
# Refusals that waiting does not mend.
_LASTING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, read."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimisation steps done."""
        return self.state["step"]

    def part(self, name: str, cls: type[T]) -> T:
        """`state[name]` as the dataclass `cls`, which must have exactly its fields.

        Raises:
            DataError: It names the fields that are missing or unknown.
        """
        values, known = self.state[name], {f.name for f in fields(cls)}  # type: ignore[arg-type]
        difference = _difference(values, known)
        if difference:
            raise DataError(f"{self.path}: {name} of another version: {difference}")
        return cls(**values)

    def check_tensors(self, expected: dict[str, Tensor], optional: Collection[str] = ()) -> None:
        """Refuse tensors that are not the run's, before any of them is copied anywhere.

        Args:
            expected: What the run itself would save now.
            optional: First parts of names that may be on either side alone ("rng", "optimizer").

        Raises:
            DataError: It names what is missing, unexpected, or of another shape or dtype.
        """

        def required(names: Collection[str]) -> set[str]:
            return {name for name in names if name.split(".")[0] not in optional}

        difference = _difference(required(self.tensors), required(expected))
        other = [
            f"{name} {_kind(self.tensors[name])} (expected {_kind(tensor)})"
            for name, tensor in expected.items()
            if name in self.tensors and _kind(self.tensors[name]) != _kind(tensor)
        ]
        parts = [difference, f"other shape or dtype {_first(other)}" if other else ""]
        if any(parts):
            raise DataError(
                f"{self.path}: checkpoint of another run: {'; '.join(filter(None, parts))}: "
                "expected the same options, or another --out"
            )


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    is_best: bool,
    warn: Say = print,
) -> Path:
    """Publish `step-<state["step"]>` under `folder` and drop what is no longer kept.

    Args:
        folder: The run's `checkpoints` folder.
        tensors: Everything to store, any device.
        state: JSON data with at least `step`.
        keep: How many of the newest to keep, beside the best.
        is_best: Whether this is the best so far.
        warn: Gets a line where an old checkpoint cannot be deleted.

    Raises:
        StorageError: The disk refused; earlier checkpoints are as they were.
    """
    # A copy each: safetensors refuses tensors that share memory, and stores row-major only.
    plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    return _write(folder, state["step"], plain, _text(state), keep, is_best, warn)


def seconds_to_write(folder: Path, size: int) -> float:
    """About how long a checkpoint of `size` bytes takes to get onto this disk: judged by two small
    folders that are written, renamed and deleted as one.

    Raises:
        StorageError: One of these does not work here.
    """
    large = min(size, _PROBE_BYTES)
    small = large // 8
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a rename and a flush take does not grow with the size.
        fixed, whole = (_time_to_write(folder, count) for count in (small, large))
    except disk_errors() as error:
        raise StorageError(
            f"{folder}: no place for checkpoints: a folder could not be written and renamed there "
            f"({first_line(error)}): expected another --out"
        ) from error
    rate = max(whole - fixed, 0.0) / max(large - small, 1)
    return whole + rate * (size - large)


def _time_to_write(folder: Path, size: int) -> float:
    partial, final = (folder / f".step-0.{end}-{uuid.uuid4().hex[:8]}" for end in ("tmp", "gone"))
    started = time.monotonic()
    try:
        partial.mkdir()
        (partial / "probe").write_bytes(os.urandom(size))  # a file system may compress
        flush(partial / "probe")
        flush(partial)
        partial.rename(final)
        flush(folder)
        return time.monotonic() - started
    finally:
        for path in (partial, final):
            shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, while training goes on.

    It holds a copy of the run's tensors in (on CUDA: page-locked) memory, which each save reuses.
    Nothing is lost where it is not asked how a save ended: `poll` and `finish` tell later.

    Args:
        folder: The run's `checkpoints` folder.
        keep: As in `save_checkpoint`.
        warn: Gets lines on what went wrong without harm, always from the caller's thread.
        retry_after: Seconds to wait before each further attempt at a save that the disk refused.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        warn: Say = print,
        retry_after: Sequence[float] = RETRY_AFTER_S,
    ) -> None:
        self.folder, self.keep, self.warn, self.retry_after = folder, keep, warn, retry_after
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._warnings: list[str] = []

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any], *, is_best: bool) -> None:
        """Copy everything and start to write it; the caller may change it at once.

        A save that is still being written is waited for; its error stays for `poll` or `finish`.

        Args:
            tensors: As in `save_checkpoint`.
            state: As in `save_checkpoint`.
            is_best: As in `save_checkpoint`.
        """
        self._wait()
        plain, text = self._copy(tensors), _text(state)
        # No daemon: a process that ends for another reason still completes its checkpoint.
        self._thread = threading.Thread(
            target=self._run, args=(state["step"], plain, text, is_best), name="checkpoint"
        )
        self._thread.start()

    def poll(self) -> Exception | None:
        """The error of a save that has failed since it was last asked for; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self._wait()
        if self._thread is not None:
            return None
        error, self._error = self._error, None
        return error

    def finish(self) -> None:
        """Wait for the save that is being written.

        Raises:
            StorageError: It, or an earlier one that was not asked for, was refused by the disk.
        """
        self._wait()
        error = self.poll()
        if error is not None:
            raise error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        warnings, self._warnings = self._warnings, []
        for warning in warnings:
            self.warn(warning)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, row-major, in memory of the writer's own."""
        copies: dict[str, Tensor] = {}
        on_gpu = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or _kind(copy) != _kind(tensor):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        for device in on_gpu:  # one wait for all copies, which follow the step on its stream
            torch.cuda.current_stream(device).synchronize()
        self._copies = copies
        return copies

    def _run(self, step: int, plain: dict[str, Tensor], text: str, is_best: bool) -> None:
        """Body of the thread."""
        say = self._warnings.append
        for wait in (*self.retry_after, None):
            try:
                _write(self.folder, step, plain, text, self.keep, is_best, say)
                return
            except StorageError as error:
                lasting = getattr(error.__cause__, "errno", None) in _LASTING
                if wait is None or lasting:
                    self._error = error
                    return
                say(f"{error}; trying again in {wait:g} s")
                time.sleep(wait)
            except Exception as error:  # a defect of ours: not to be lost in a thread
                self._error = error
                return


def _text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=1)


def _write(
    folder: Path,
    step: int,
    plain: dict[str, Tensor],
    text: str,
    keep: int,
    is_best: bool,
    warn: Say,
) -> Path:
    """The one way in which a checkpoint gets onto the disk; as `save_checkpoint`.

    `plain` holds row-major tensors on the CPU that share no memory, `text` is the state as JSON.
    """
    final = folder / f"step-{step}"
    partial = folder / f".{final.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, sum(t.nbytes for t in plain.values()) + len(text))
        partial.mkdir()
        save_file(plain, partial / "state.safetensors")
        (partial / "state.json").write_text(text, encoding="utf-8")
        for name in STATE_FILES:
            flush(partial / name)
        (partial / "manifest.json").write_text(_manifest(partial), encoding="utf-8")
        flush(partial / "manifest.json")
        flush(partial)
        _publish(partial, final)
        index = read_index(folder)
        index["last"] = final.name
        if is_best or "best" not in index:
            index["best"] = final.name
        index_text = json.dumps(index)
        write_atomically(folder / "index.json", lambda path: path.write_text(index_text))
    except disk_errors() as error:
        raise StorageError(
            f"{final}: the checkpoint could not be written: {first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # Those of later steps, damaged ones that the run fell back from, are no reason to drop others.
    earlier = [path for path in checkpoints(folder) if _step_of(path) <= step]
    for old in earlier[keep:]:
        if old.name != index["best"]:
            _delete(old, warn)
    return final


def _check_space(folder: Path, size: int) -> None:
    """Refuse before anything is written what would fill the disk."""
    needed, disk = int(SPACE_FACTOR * size), shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # a total of 0: a file system that does not tell
        raise OSError(
            errno.ENOSPC, f"{needed:,} bytes needed, {disk.free:,} free: expected more space"
        )


def _publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name, also where an earlier one of the same step has it.

    At every moment one of the two has the name or gets it back from `remove_leftovers`.
    """
    replaced = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
    has_earlier = final.exists()  # after a fallback, or a stop at the very edge of an epoch
    if has_earlier:
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if has_earlier:
            replaced.rename(final)
        raise
    flush(final.parent)
    if has_earlier:
        shutil.rmtree(replaced, ignore_errors=True)


def _delete(path: Path, warn: Say) -> None:
    """Delete a checkpoint: under its name there is all of it, or nothing."""
    gone = path.with_name(f".{path.name}.gone-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        warn(f"{path}: an old checkpoint that could not be deleted: {first_line(error)}")


def remove_leftovers(out: Path) -> None:
    """Clear away what a crash while writing has left in a run folder, before anything is read.

    Only for the process that holds the run's lock: another one's unfinished save looks the same.
    """
    folder = out / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = re.fullmatch(r"\.(step-\d+)\.(tmp|old|gone)-[0-9a-f]+", path.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            path.rename(folder / match[1])  # the crash came before its successor had the name
        else:
            shutil.rmtree(path, ignore_errors=True)
    for place in (out, folder):
        remove_temporary(place)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _step_of(path) >= 0]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    """The step in a checkpoint folder's name, -1 of any other name."""
    match = re.fullmatch(r"step-([0-9]{1,18})", path.name)
    return -1 if match is None else int(match[1])


def read_index(folder: Path) -> dict[str, str]:
    """Names of the `last` and the `best` checkpoint, those that there are.

    Without a readable index the last is the newest.
    """
    names = [path.name for path in checkpoints(folder)]
    try:
        index = read_json(folder / "index.json", "an index")
    except DataError:
        index = None
    found = {k: v for k, v in index.items() if v in names} if isinstance(index, dict) else {}
    return {"last": names[0], **found} if names else {}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify it against its manifest.

    Raises:
        DataError: A file is missing, too many, not what was written, or not a run's.
    """
    try:
        # Hidden files are a file system's or a desktop's.
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        difference = _difference(names, FILES)
        if difference:
            raise DataError(f"{path}: expected a checkpoint of a run: {difference}")
        # Byte for byte, so that no change of the manifest itself goes unseen either.
        if (path / "manifest.json").read_bytes() != _manifest(path).encode():
            raise DataError(
                f"{_damaged(path)}: does not match its manifest: the checkpoint is damaged"
            )
        state = read_json(path / "state.json", "the state of a run")
    except OSError as error:
        raise DataError(f"{path}: expected a checkpoint of a run: {first_line(error)}") from error
    _check_state(path, state)
    return Checkpoint(path, read_tensors(path / "state.safetensors"), state)


def _manifest(path: Path) -> str:
    """What the manifest of the files in `path` must be."""
    return json.dumps({name: _fingerprint(path / name) for name in STATE_FILES}, indent=1)


def _damaged(path: Path) -> Path:
    """The file that differs from what the manifest says of it, or else the manifest."""
    try:
        manifest = read_json(path / "manifest.json", "a manifest")
        for name in STATE_FILES:
            if manifest[name] != _fingerprint(path / name):
                return path / name
    except (DataError, LookupError, TypeError):
        pass
    return path / "manifest.json"


def _check_state(path: Path, state: Any) -> None:
    """Refuse a state that lacks what every run goes on from.

    Raises:
        DataError: It names the key.
    """
    file = path / "state.json"
    if not isinstance(state, dict):
        raise DataError(f"{file}: expected the state of a run, got {type(state).__name__}")
    for key, kind in STATE_KINDS.items():
        if type(state.get(key)) is not kind:
            found = type(state[key]).__name__ if key in state else "nothing"
            raise DataError(f"{file}: {key}: expected {kind.__name__}, got {found}")
    if state["step"] < 0 or _step_of(path) not in (-1, state["step"]):
        raise DataError(f"{file}: step {state['step']}: expected that of {path.name}")


def newest_checkpoint(folder: Path, warn: Say, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is passed over with a warning.

    `before`: only one of fewer steps.

    Raises:
        DataError: There are checkpoints, but none that verifies.
    """
    found = [path for path in checkpoints(folder) if before is None or _step_of(path) < before]
    for path in found:
        try:
            return load_checkpoint(path)
        except DataError as error:
            warn(f"{error}; falling back to the previous checkpoint")
    if found:
        raise DataError(f"{folder}: none of its {len(found)} checkpoints is sound")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name, the tensors themselves and no copies.

    `optimizer.<index>.<name>` of a parameter, `optimizer.group<index>.<name>` of a group. Learning
    rates are the schedule's.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = {str(i): optimizer.state.get(p, {}) for i, p in enumerate(params)}
    own |= {f"group{i}": group for i, group in enumerate(optimizer.param_groups)}
    return {
        f"optimizer.{index}.{name}": value
        for index, values in own.items()
        for name, value in values.items()
        if isinstance(value, Tensor) and name != "lr"
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; other names in `tensors` are passed over.

    Raises:
        DataError: The state is another optimiser's, or that of other parameters.
    """
    ours = optimizer_tensors(optimizer)
    theirs = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (list(t[name].shape) if name in t else "none" for t in (ours, theirs))
        if here != there:
            raise DataError(
                f"{name} in the checkpoint: {there}, expected {here}: made with another optimiser "
                "or other parameters"
            )
    for name, value in ours.items():
        value.copy_(theirs[name])


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _kind(tensor: Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _difference(found: Collection[str], expected: Collection[str]) -> str:
    """What is missing and what is too many, in one line; empty where nothing is."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = [f"missing {_first(missing)}" if missing else ""]
    parts += [f"unexpected {_first(unknown)}" if unknown else ""]
    return "; ".join(filter(None, parts))


def _first(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
