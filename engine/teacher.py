"""Where a run's teacher comes from: a file, a library's weights, or a train-teacher run."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from torch import nn

from .config import RunConfig
from .errors import DataError
from .files import read_json

WEIGHTS_FILE = "teacher.safetensors"


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


def find_teacher(config: RunConfig) -> Path | None:
    """Weights of the newest finished train-teacher run of this teacher under the output root."""
    found = []
    for weights in Path(config.out_root).glob(f"*/{WEIGHTS_FILE}"):
        try:
            run = read_json(weights.parent / "run.json", "a run.json")["config"]
            same = run["student"] == config.teacher.name and run["data"]["name"] == config.data.name
        except (OSError, DataError, LookupError, TypeError):
            continue
        if same:
            found.append((weights.stat().st_mtime, weights))
    return max(found)[1] if found else None


def resolve_weights(config: RunConfig) -> str:
    """`--teacher.weights`, or the newest train-teacher run.

    Raises:
        DataError: There is neither.
    """
    if config.teacher.weights is not None:
        return config.teacher.weights
    found = find_teacher(config)
    if found is None:
        raise DataError(
            f"no weights for teacher {config.teacher.name}: expected --teacher.weights, or a "
            f"train-teacher run under {config.out_root}/ (make one: dfptkd train-teacher "
            f"{config.recipe})"
        )
    return str(found)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
