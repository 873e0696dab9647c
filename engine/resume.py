"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
)
from .config import RunConfig, to_dict
from .distributed import World
from .errors import DataError, UsageError
from .lock import RunLock
from .options import MAY_CHANGE, related_terms
from .teacher import WEIGHTS_FILE


def start_of_main(
    config: RunConfig,
    out: Path,
    end_step: int,
    world: World,
    locks: ExitStack,
    warn: Callable[[str], None],
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that rank 0 goes on from, in every process, and whether the run is finished.

    Rank 0 takes the lock of a run that is not; the others get the checkpoint from it, and need not
    see its disk.

    Args:
        config: The run.
        out: Its folder.
        end_step: Where it ends.
        world: The processes of the run.
        locks: Holds the lock of a run that is not finished.
        warn: Gets a line for each damaged checkpoint.
    """
    found: list[Checkpoint] = []

    def find() -> dict[str, Any] | None:
        seems_finished = is_finished(out, config)
        if not seems_finished:
            locks.enter_context(RunLock(out, warn))
            remove_leftovers(out)
        checkpoint = find_checkpoint(config, out, warn)
        finished = seems_finished and checkpoint is not None and checkpoint.step >= end_step
        if seems_finished and not finished:  # it is to go on for longer
            locks.enter_context(RunLock(out, warn))
        if checkpoint is None:
            return None
        check_same_run(config, checkpoint)
        check_same_parts(config, checkpoint, world)
        found.append(checkpoint)
        return {"path": str(checkpoint.path), "state": checkpoint.state, "finished": finished}

    shared = world.of_main(find)
    if shared is None:
        return None, False
    tensors = world.tensors_of_main(found[0].tensors if found else None)
    return Checkpoint(Path(shared["path"]), tensors, shared["state"]), shared["finished"]


def find_checkpoint(config: RunConfig, out: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """What `--resume` asks for.

    Raises:
        UsageError: The folder holds a run that `never` would overwrite.
        DataError: No sound checkpoint where one was named.
    """
    folder = out / "checkpoints"
    if config.resume == "never":
        if checkpoints(folder):
            raise UsageError(f"{out}: holds a run, and resume is 'never': expected another --out")
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if checkpoints(path / "checkpoints"):
            return newest_checkpoint(path / "checkpoints", warn)
        return load_checkpoint(path)
    return newest_checkpoint(folder, warn)


def check_same_run(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on from a checkpoint of another configuration, naming the differences."""
    different = differences(checkpoint.state["config"], config)
    if different:
        raise DataError(
            f"{checkpoint.path}: checkpoint of another run ({'; '.join(different)}): "
            "expected the same options, or another --out"
        )


def check_same_parts(config: RunConfig, checkpoint: Checkpoint, world: World) -> None:
    """Refuse to cut batches otherwise than before, where loss terms relate the images of a part."""
    state, terms = checkpoint.state, related_terms(config)
    # Absent in a checkpoint of a version that knew neither: one part.
    then = (state["config"].get("accumulate", 1), state.get("world_size", 1))
    now = (config.accumulate, world.size)
    if terms and math.prod(then) != math.prod(now):
        raise DataError(
            f"{checkpoint.path}: made with accumulate={then[0]} in {then[1]} processes, this run "
            f"has {now[0]} in {now[1]}, and loss terms compare the images of a part "
            f"({', '.join(terms)}): expected as many parts, or another --out"
        )


def differences(then: dict[str, Any], config: RunConfig, exact: Collection[str] = ()) -> list[str]:
    """What tells a run from another of the same folder, a line an option.

    Args:
        then: The other's configuration, as JSON has it.
        config: The run's.
        exact: Options that must be equal although a run that goes on may change them.
    """
    # An option that is younger than the other run: what its default does was done before, too.
    before, now = flat(to_dict(RunConfig())) | flat(then), flat(to_dict(config))
    return [
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in sorted(before.keys() | now.keys())
        if (key not in MAY_CHANGE or key in exact)
        and _plain(before.get(key)) != _plain(now.get(key))
    ]


def check_same_state(checkpoint: Checkpoint, ours: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other data, or another teacher.

    Args:
        checkpoint: The checkpoint.
        ours: What this run has, by the names under which the checkpoint has it.
    """
    then, now = flat({name: checkpoint.state.get(name) for name in ours}), flat(ours)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise DataError(
                f"{checkpoint.path}: made with {key}={then.get(key)}, this run has {now.get(key)}: "
                "expected the same, or another --out"
            )


def is_finished(out: Path, config: RunConfig) -> bool:
    """Whether the run has left its finished network."""
    name = WEIGHTS_FILE if config.role == "teacher" else "student.safetensors"
    return (out / name).is_file()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _plain(value: Any) -> Any:
    """JSON makes lists of tuples; compare them as equal."""
    return list(value) if isinstance(value, tuple) else value
