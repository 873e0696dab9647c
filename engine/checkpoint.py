"""Checkpoints: one folder a step, complete or absent, without pickle.

    checkpoints/step-<N>/state.safetensors   every tensor of the run, by name
                         state.json          every number and text of the run
                         manifest.json       size and SHA-256 of the two, written last
    checkpoints/index.json                   {"last": "step-<N>", "best": "step-<M>"}

A checkpoint is written to a temporary folder, flushed and renamed: a crash leaves the previous one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import DataError, StorageError
from .files import write_atomically

STATE_FILES = ("state.safetensors", "state.json")


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


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int, is_best: bool
) -> Path:
    """Publish `step-<state["step"]>` under `folder` and drop what is no longer kept.

    Args:
        folder: The run's `checkpoints` folder.
        tensors: Everything to store, any device.
        state: JSON data with at least `step`.
        keep: How many of the newest to keep, beside the best.
        is_best: Whether this is the best so far.

    Raises:
        StorageError: The disk refused; earlier checkpoints are as they were.
    """
    final = folder / f"step-{state['step']}"
    partial = folder / f".{final.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        # A copy each: safetensors refuses tensors that share memory, and stores row-major only.
        plain = {
            name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()
        }
        save_file(plain, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {name: _fingerprint(partial / name) for name in STATE_FILES}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in (*STATE_FILES, "manifest.json"):
            _flush(partial / name)
        if final.exists():  # the same step again, after a fallback to an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{final}: the checkpoint could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    index = read_index(folder)
    index["last"] = final.name
    if is_best or "best" not in index:
        index["best"] = final.name
    write_atomically(
        folder / "index.json", lambda path: path.write_text(json.dumps(index)) and None
    )
    for old in checkpoints(folder)[keep:]:
        if old.name != index["best"]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def read_index(folder: Path) -> dict[str, str]:
    """Names of the `last` and the `best` checkpoint, those that there are."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(index, dict):
        return {}
    return {k: v for k, v in index.items() if isinstance(v, str) and (folder / v).is_dir()}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify it against its manifest.

    Raises:
        DataError: A file is missing, or not what was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in STATE_FILES:
            if manifest.get(name) != _fingerprint(path / name):
                raise DataError(
                    f"{path / name}: does not match its manifest: the checkpoint is damaged"
                )
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(path, load_file(path / "state.safetensors"), state)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: expected a checkpoint of a run: {reason}") from error


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is passed over with a warning.

    Raises:
        DataError: There are checkpoints, but none that verifies.
    """
    found = checkpoints(folder)
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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
