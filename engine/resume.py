"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
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
from .data import ImageData
from .data.crops import crops_of_record
from .distributed import World
from .errors import DataError, UsageError
from .files import read_json
from .identity import SHORT, STUDENT_FILE, WEIGHTS_FILE, DataRecord, fingerprint
from .lock import RunLock
from .models import create_model
from .options import MAY_CHANGE, related_terms
from .teacher import names_file

EXTEND = "extend"


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


def crops_of_before(config: RunConfig, folders: Iterable[Path]) -> str:
    """How the images of a run are cut that goes on in one of `folders`: as before.

    Its checkpoint may be older than the choice, or have been made with another one than `auto`.
    """
    crops = config.data.crops
    if crops != "auto" or config.resume == "never":
        return crops
    if config.resume not in ("auto", EXTEND):
        path = Path(config.resume)
        folders = [path, path.parent.parent]  # a run's folder, or a checkpoint's
    for folder in folders:
        if checkpoints(folder / "checkpoints"):
            with suppress(DataError, KeyError, TypeError):  # a run goes on without its record
                record = read_json(folder / "run.json", "a run.json")
                return crops_of_record(record["config"]["data"])
    return crops


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
    if config.resume not in ("auto", EXTEND):
        path = Path(config.resume)
        if checkpoints(path / "checkpoints"):
            return newest_checkpoint(path / "checkpoints", warn)
        return load_checkpoint(path)
    return newest_checkpoint(folder, warn)


def check_same_run(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on from a checkpoint of another configuration, naming the differences.

    Raises:
        DataError: An option differs that may not; with `resume='extend'` the number of epochs may.
        UsageError: That is asked for with fewer epochs than before.
    """
    extends = config.resume == EXTEND
    before = planned_epochs(checkpoint, config)
    if extends and config.epochs < before:
        raise UsageError(
            f"resume={EXTEND!r} with epochs={config.epochs}: {checkpoint.path} is of a run of "
            f"{before} epochs: expected as many, or more"
        )
    different = differences(checkpoint.state["config"], config, but=("epochs",) if extends else ())
    if different:
        longer = config.epochs > before and not extends
        more = f", or --resume {EXTEND} for a run that is longer than planned" if longer else ""
        place = "another --out"
        if config.role == "teacher":  # its folder is not the one that `train` was told
            place = "another --out-root, or that folder of an earlier teacher removed"
        raise DataError(
            f"{checkpoint.path}: checkpoint of another run ({'; '.join(different)}): "
            f"expected the same options, or {place}{more}"
        )


def planned_epochs(checkpoint: Checkpoint, config: RunConfig) -> int:
    """Epochs that a checkpoint's run was to have; where it does not say so, those of `config`."""
    epochs = checkpoint.state["config"].get("epochs")
    return epochs if type(epochs) is int else config.epochs


def extensions(checkpoint: Checkpoint | None, config: RunConfig) -> list[dict[str, int]]:
    """Each time that the run was made longer than planned, this one among them."""
    if checkpoint is None:
        return []
    before = planned_epochs(checkpoint, config)
    found = list(checkpoint.state.get("extended") or ())
    if before != config.epochs:
        found.append({"before": before, "after": config.epochs, "step": checkpoint.step})
    return found


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


def differences(
    then: dict[str, Any],
    config: RunConfig,
    exact: Collection[str] = (),
    but: Collection[str] = (),
) -> list[str]:
    """What tells a run from another of the same folder, a line an option.

    Args:
        then: The other's configuration, as JSON has it.
        config: The run's.
        exact: Options that must be equal although a run that goes on may change them.
        but: Options that are not compared.
    """
    # An option that is younger than the other run: what its default does was done before, too.
    before, now = flat(to_dict(RunConfig())) | flat(then), flat(to_dict(config))
    return [
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in sorted(before.keys() | now.keys())
        if (key not in MAY_CHANGE or key in exact)
        and key not in but
        and _plain(before.get(key)) != _plain(now.get(key))
    ]


def check_same_data(checkpoint: Checkpoint, data: DataRecord, pipeline: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made with other data; what it does not say is not compared.

    Args:
        checkpoint: The checkpoint.
        data: What this run has.
        pipeline: What brings its images, as a checkpoint has it.

    Raises:
        DataError: It names the differences.
    """
    then = checkpoint.state["data"]
    record = run_of(checkpoint).get("data")  # an older checkpoint does not name the classes
    there = DataRecord.from_record((record if isinstance(record, dict) else {}) | then)
    different = there.differences(data)
    different += [
        f"{key} {then[key]} there, {value} here"
        for key, value in pipeline.items()
        if key in then and then[key] != value
    ]
    if different:
        raise DataError(
            f"{checkpoint.path}: made with other data ({'; '.join(different)}): expected the same, "
            "or another --out"
        )


def check_same_start(checkpoint: Checkpoint, sha256: str | None) -> None:
    """Refuse a checkpoint of a student that began from other weights.

    Args:
        checkpoint: The checkpoint; one that does not say is not compared.
        sha256: Fingerprint of what this run's student begins from; None: from random numbers.

    Raises:
        DataError: They are others.
    """
    then = checkpoint.state.get("initial_sha256")
    if None not in (then, sha256) and then != sha256:
        raise DataError(
            f"{checkpoint.path}: its student began from other weights (SHA-256 {then[:SHORT]} "
            f"there, {sha256[:SHORT]} here): expected the same student_weights, or another --out"
        )


def check_same_teacher(checkpoint: Checkpoint, sha256: str | None, weights: str | None) -> None:
    """Refuse a checkpoint that was made with another teacher.

    Args:
        checkpoint: The checkpoint.
        sha256: Fingerprint of this run's teacher; None: it has none.
        weights: Where it comes from.

    Raises:
        DataError: The fingerprints differ.
    """
    then = checkpoint.state.get("teacher_sha256", sha256)
    if then != sha256:
        there, here = (f"SHA-256 {s[:SHORT]}" if s else "none" for s in (then, sha256))
        raise DataError(
            f"{checkpoint.path}: made with another teacher ({there} there, {here} here, "
            f"{weights}): expected the same, or another --out"
        )


def check_finished(config: RunConfig, checkpoint: Checkpoint, data: ImageData) -> str:
    """Refuse a finished run of other data, or of another teacher than this run would have; its
    options are compared already.

    Args:
        config: The run.
        checkpoint: The last one of the finished run.
        data: What the run would have.

    Returns:
        What there is to say of its teacher; empty: nothing.

    Raises:
        DataError: It is another run, or the weights that were named cannot be read.
    """
    check_same_data(checkpoint, DataRecord.of(data), data.pipeline)
    if config.student_weights is not None and checkpoint.state.get("initial_sha256"):
        student = create_model(
            config.student,
            num_classes=data.num_classes,
            weights=config.student_weights,
            say=lambda _: None,
        )
        check_same_start(checkpoint, fingerprint(student))
    if config.method == "ce":
        return ""
    own, given = recorded_teacher(checkpoint), config.teacher.weights
    weights = own if given is None else given
    if weights is None:  # of a version that did not say
        return ""
    if given is None and names_file(weights) and not Path(weights).is_file():
        return f", its teacher {weights} is no longer there"
    if weights != own or names_file(weights):  # a library's weights of one name are the same
        teacher = create_model(
            config.teacher.name,
            num_classes=data.num_classes,
            weights=weights,
            ema=config.teacher.ema,
            say=lambda _: None,
        )
        check_same_teacher(checkpoint, fingerprint(teacher), weights)
    return f", teacher {weights}"


def recorded_teacher(checkpoint: Checkpoint) -> str | None:
    """The weights of the teacher, as a checkpoint's run names them."""
    teacher = run_of(checkpoint).get("teacher")
    weights = teacher.get("weights") if isinstance(teacher, dict) else None
    return weights if isinstance(weights, str) else None


def run_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """run.json of the folder that a checkpoint lies in; empty where there is none."""
    try:
        found = read_json(checkpoint.path.absolute().parents[1] / "run.json", "a run.json")
    except (DataError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def is_finished(out: Path, config: RunConfig) -> bool:
    """Whether the run has left its finished network."""
    name = WEIGHTS_FILE if config.role == "teacher" else STUDENT_FILE
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
