"""`dfptkd eval`: the accuracy of a trained network, measured again from what lies on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .config import RunConfig, from_dict
from .data import load_data
from .errors import DataError
from .export import read_source
from .kernel_choice import measured_kernels
from .machine import pick_device
from .metrics import evaluate
from .models.parts import channels_last


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in percent."""

    model: str
    data: str
    images: int
    top1: float
    top5: float
    skipped: int
    """Test images that were left out, as they are in quarantine."""
    logged: float | None
    """top-1 that the run logged at this step, if it evaluated there."""


def evaluate_checkpoint(
    path: Path,
    *,
    root: str | None = None,
    limit: int | None = None,
    loader: str | None = None,
    quarantine: str | None = None,
    skip_quarantined: bool = False,
    batch_size: int = 256,
    device: str | None = None,
) -> EvalResult:
    """Evaluate the network of a run folder or of a checkpoint folder in it.

    Args:
        path: Run folder, or `checkpoints/step-N` in one.
        root: Folder of the data; absent: as the run had it.
        limit: Most test images; absent: as the run had it.
        loader: What decodes image files; absent: as the run had it.
        quarantine: List by verify-data; absent: as the run had it.
        skip_quarantined: Leave out the images on it, and say so.
        batch_size: Images in a step.
        device: cpu or cuda; absent: cuda where there is one.

    Raises:
        DataError: No trained network there, or the data set has other classes.
    """
    source = read_source(path)
    config = from_dict(RunConfig, source.record.run["config"])
    where = pick_device(dataclasses.replace(config, device=device))
    given = {
        "root": root, "limit": limit, "loader": loader, "quarantine": quarantine,
        "skip_quarantined": skip_quarantined or None,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    options["keep_test"] = False  # it is read once
    data = load_data(dataclasses.replace(config.data, **options), where)
    if data.num_classes != source.data["num_classes"]:
        raise DataError(
            f"{path}: a network of {source.data['num_classes']} classes, "
            f"{data.name} has {data.num_classes}: expected the run's own data set"
        )
    model = channels_last(source.model(), where)
    with measured_kernels():  # as in a run, nothing fused serves that was not compared
        accuracy = evaluate(model, data, batch_size=batch_size, workers=config.data.workers)
    return EvalResult(
        config.student,
        data.name,
        len(data.test),
        accuracy["top1"],
        accuracy["top5"],
        data.skipped_test,
        source.top1,
    )
