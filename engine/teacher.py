"""Where a run's teacher comes from: a file, a library's weights, or a train-teacher run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import DataError
from .identity import WEIGHTS_FILE, DataRecord, NetworkRecord, network_of, same_model
from .models.weights import FILE_SUFFIXES, PACKAGE


def teacher_run(config: RunConfig) -> RunConfig:
    """The run that trains this recipe's teacher: labels only, all training images.

    `teacher.lr` is for `teacher.global_batch`: where rates follow the batch, from there on.
    """
    teacher = config.teacher
    lr_batch = None if config.optim.lr_batch is None else teacher.global_batch
    return dataclasses.replace(
        config,
        role="teacher",
        arm=None,
        method="ce",
        student=teacher.name,
        student_weights=None,
        seed=0,
        seeds=None,
        epochs=teacher.epochs,
        global_batch=teacher.global_batch,
        max_steps=None,
        out=None,
        resume="auto",
        data=dataclasses.replace(config.data, train_limit=None),
        loss=config.loss.of_any_method(),
        optim=dataclasses.replace(config.optim, lr=teacher.lr, lr_batch=lr_batch),
    )


def run_folder(config: RunConfig) -> Path:
    """The run's output folder: `out`, or a name made of what the run is."""
    if config.out is not None:
        return Path(config.out)
    if config.role == "teacher":
        model = config.student.replace(":", "-").replace("/", "-")
        return Path(config.out_root) / f"teacher-{config.data.name}-{model}-seed{config.seed}"
    recipe = config.recipe if config.arm is None else f"{config.recipe}+{config.arm}"
    return Path(config.out_root) / f"{recipe}-{config.method}-seed{config.seed}"


@dataclass(frozen=True)
class TeacherChoice:
    """The weights of a run's teacher, and how they were come by."""

    weights: str
    said: list[str] = field(default_factory=list)
    """A line each: what was passed over, and what was taken in its place."""
    warnings: list[str] = field(default_factory=list)
    """Reservations about them, a line each."""
    trained: dict[str, Any] = field(default_factory=dict)
    """Their training, as `NetworkRecord.record` has it."""


def find_teacher(
    config: RunConfig, data: DataRecord | None = None, say: Callable[[str], None] | None = None
) -> Path | None:
    """Weights of a train-teacher run of this teacher under the output root.

    Found is what was trained to its end, on these data: all the images that the run trains on, and
    the same classes. Of several the one of the most epochs counts, and of these the newest.

    Args:
        config: The run.
        data: Its data; None: nothing but their name is known.
        say: Gets a line that names what was passed over.
    """
    data = DataRecord(name=config.data.name) if data is None else data
    fit: list[tuple[float, float, Path, NetworkRecord]] = []
    passed_over = []
    for weights in sorted(Path(config.out_root).glob(f"*/{WEIGHTS_FILE}")):
        known = network_of(weights)
        if known.model is None or not same_model(known.model, config.teacher.name):
            continue
        complaints = known.complaints(data)
        if complaints:
            passed_over.append(f"{weights} ({'; '.join(complaints)})")
            continue
        with suppress(OSError):
            fit.append((known.epochs or 0.0, weights.stat().st_mtime, weights, known))
    best = max(fit, default=None, key=lambda found: found[:2])
    if best is not None:
        others = sorted(found for found in fit if found is not best)
        passed_over += [f"{path} ({known}: fewer epochs, or older)" for _, _, path, known in others]
    if passed_over and say is not None:
        say(f"teachers passed over: {', '.join(passed_over)}")
    return None if best is None else best[2]


def choose_teacher(
    config: RunConfig, data: DataRecord | None = None, own: str | None = None
) -> TeacherChoice:
    """`--teacher.weights`, or what the run had so far, or a train-teacher run.

    Args:
        config: The run.
        data: Its data; None: nothing but their name is known.
        own: The weights that its record names, where it goes on.

    Raises:
        DataError: There are none.
    """
    weights, said = config.teacher.weights, []
    if weights is None and own is not None:
        if not names_file(own) or Path(own).is_file():
            weights = own
        else:
            said.append(f"the run's teacher, {own}, is no longer there")
    if weights is None:
        found = find_teacher(config, data, said.append)
        if found is None:
            raise DataError(
                f"no weights for teacher {config.teacher.name}: expected --teacher.weights, or a "
                f"train-teacher run under {config.out_root}/ (make one: dfptkd train-teacher "
                f"{config.recipe}){''.join(f'; {line}' for line in said)}"
            )
        weights = str(found)
    known = network_of(Path(weights)) if names_file(weights) else NetworkRecord()
    warnings = [f"teacher {weights}: {line}" for line in _complaints(config, data, known)]
    return TeacherChoice(weights, said, warnings, known.record())


def names_file(weights: str) -> bool:
    """Whether weights are a file, and not known to a library by their name."""
    path = Path(weights)
    is_path = path.suffix in FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()
    return is_path and not weights.startswith(PACKAGE)


def _complaints(config: RunConfig, data: DataRecord | None, known: NetworkRecord) -> list[str]:
    """Reservations about a network that a run is to have as its teacher."""
    found = [] if data is None else known.complaints(data)
    planned = known.planned_epochs
    if not found and planned is not None and planned < config.teacher.epochs:
        found.append(f"trained for {planned} epochs, where the recipe has {config.teacher.epochs}")
    if known.extended is not None:
        found.append(known.extended)
    if known.model is not None and not same_model(known.model, config.teacher.name):
        found.append(f"says that it is {known.model}, not {config.teacher.name}")
    return found
