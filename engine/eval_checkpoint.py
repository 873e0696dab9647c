"""`dfptkd eval`: the accuracy of a trained network, measured from what lies on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .config import DataConfig, EmaChoice, RunConfig, from_dict
from .data import SOURCES, load_data
from .data.crops import crops_of_record
from .errors import DataError, UsageError
from .export import is_of_run, read_source
from .identity import DataRecord, network_of, same_model
from .kernel_choice import measured_kernels
from .machine import pick_device
from .metrics import evaluate
from .models import create_model
from .models.input_norm import InputNorm, stated_norm
from .models.parts import channels_last
from .models.weights import PACKAGE
from .options import refuse_without_effect


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
    """top-1 that its training logged at this step, if it evaluated there."""
    weights: str = ""
    """Which of the network: "EMA", or "raw" where the run has kept an EMA too; else empty."""
    notes: list[str] = field(default_factory=list)
    """Reservations about the figure, a line each."""


@dataclass(frozen=True)
class Trained:
    """A network to evaluate, and what is known of it."""

    model: str
    make: Callable[[int], nn.Module]
    """The network with its weights, for so many classes."""
    data: DataRecord
    """The data set of its training."""
    config: DataConfig
    """That data set, as its training had it."""
    norm: Callable[[int], InputNorm | None]
    """Number of classes -> mean and std of its images; None: the data's."""
    top1: float | None
    weights: str = ""
    notes: list[str] = field(default_factory=list)
    """Reservations about the weights, a line each."""


def evaluate_checkpoint(
    path: Path,
    *,
    model: str | None = None,
    root: str | None = None,
    limit: int | None = None,
    loader: str | None = None,
    quarantine: str | None = None,
    skip_quarantined: bool = False,
    batch_size: int = 256,
    device: str | None = None,
    ema: bool = False,
    **data_options: Any,
) -> EvalResult:
    """Evaluate the network of a run folder, of a checkpoint folder in it, or of any weights file.

    Args:
        path: Run folder, `checkpoints/step-N` in one, or a file of weights, in one or not, or
            "package:NAME" for the one in an installed package.
        model: Name of the architecture; absent: as the file or its run says.
        root: Folder of the data; absent: as the run had it.
        limit: Most test images; absent: as the run had it.
        loader: What decodes image files; absent: as the run had it.
        quarantine: List by verify-data; absent: as the run had it.
        skip_quarantined: Leave out the images on it, and say so.
        batch_size: Images in a step.
        device: cpu or cuda; absent: cuda where there is one.
        ema: The average of the network's weights that its training has kept, in place of the raw
            ones.
        data_options: Other fields of `DataConfig` (`name`, `image_size`, `mean`, `std`); absent: as
            the file or its run says.

    Raises:
        DataError: No trained network there, or no average, or the data set has other classes.
        UsageError: A file does not say what it is, and neither does an option; or an option has no
            effect on such data.
    """
    given = data_options | {
        "root": root, "limit": limit, "loader": loader, "quarantine": quarantine,
        "skip_quarantined": skip_quarantined or None,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if str(path).startswith(PACKAGE) or (path.is_file() and not is_of_run(path)):
        trained = _of_file(path, model, options, ema)
    else:
        trained = _of_run(path, model, ema)
    where = pick_device(dataclasses.replace(RunConfig(), device=device))
    asked = _data_config(trained.config, options)
    refuse_without_effect([f"data.{n}" for n in options], [RunConfig(data=asked)], "eval")
    data = load_data(dataclasses.replace(asked, keep_test=False), where)  # it is read once
    here = DataRecord.of(data)
    other = trained.data.other_classes(here)
    if other:
        raise DataError(
            f"{path}: trained on other classes ({other[0]}): expected the data set that it was "
            "trained on"
        )
    notes = [*trained.notes] + [
        f"not the test images of its training: {difference}"
        for difference in trained.data.other_images(here, "test")
    ]
    network = trained.make(data.num_classes)
    norm = trained.norm(data.num_classes)
    if norm is not None and not options.keys() & {"mean", "std"}:
        if not norm.equals(InputNorm(data.mean, data.std)):
            notes.append(f"images are normalised by the network's own {norm} ({norm.source})")
        data = dataclasses.replace(data, mean=norm.mean, std=norm.std)
    network = channels_last(network.eval(), where)
    with measured_kernels():  # as in a run, nothing fused serves that was not compared
        accuracy = evaluate(network, data, batch_size=batch_size, workers=trained.config.workers)
    return EvalResult(
        trained.model,
        data.name,
        len(data.test),
        accuracy["top1"],
        accuracy["top5"],
        data.skipped_test,
        trained.top1,
        trained.weights,
        notes,
    )


def _of_run(path: Path, model: str | None, ema: bool) -> Trained:
    """The network of a run folder, of a checkpoint folder in one, or of a file in either."""
    source = read_source(path, ema=ema)
    config = from_dict(RunConfig, source.record.run["config"])
    if model is not None and not same_model(model, config.student):
        raise UsageError(f"--model {model}: {path} holds a {config.student}: expected no --model")
    crops = crops_of_record(source.record.run["config"]["data"])
    return Trained(
        config.student,
        lambda _: source.model(),
        DataRecord.from_record(source.data),
        dataclasses.replace(config.data, crops=crops),
        lambda _: source.norm,
        source.top1,
        "EMA" if source.is_ema else "raw" if source.has_ema else "",
    )


def _of_file(path: Path, model: str | None, options: Mapping[str, Any], ema: bool) -> Trained:
    """The network of a weights file that no run has left where it lies.

    Raises:
        UsageError: Neither the file nor an option says what it is.
    """
    known = network_of(path)
    name = known.model if model is None else model
    if name is None:
        raise UsageError(
            f"{path} does not say which network it holds: expected --model NAME, such as "
            "cifar:resnet20, torchvision:resnet50 or timm:NAME"
        )
    config = _config_of_record(known.data)
    if config is None:
        if "name" not in options:
            raise UsageError(
                f"{path} does not say which data its network is for: expected --data.name NAME, "
                "and --data.root DIR"
            )
        config = from_dict(DataConfig, {"name": options["name"]}, "data.")
    which: EmaChoice = "yes" if ema else "auto"
    # A network of the same names and shapes, of another stride, takes the weights too.
    is_other = known.model is not None and not same_model(known.model, name)
    return Trained(
        name,
        lambda classes: create_model(name, num_classes=classes, weights=str(path), ema=which),
        known.data,
        config,
        lambda classes: stated_norm(name, str(path), classes),
        None if is_other else known.top1,
        "EMA" if ema else "",
        [f"{path} says that it is {known.model}, not {name}"] if is_other else [],
    )


def _config_of_record(data: DataRecord) -> DataConfig | None:
    """The data that a file names in its header."""
    if data.name is None:
        return None
    values: dict[str, Any] = {"name": data.name}
    if data.name in SOURCES:
        values |= {"mean": data.mean, "std": data.std}
        if data.preprocessing is not None and "crops" in data.preprocessing:
            values["crops"] = data.preprocessing["crops"]
    if data.name in (*SOURCES, "synthetic") and len(set(data.image_size or ())) == 1:
        values["image_size"] = (data.image_size or ())[0]
    if data.name == "synthetic" and data.num_classes is not None:
        values["num_classes"] = data.num_classes
    try:
        return from_dict(DataConfig, values, "data.")
    except UsageError:  # of a stranger
        return None


def _data_config(config: DataConfig, options: Mapping[str, Any]) -> DataConfig:
    """The data to evaluate on: another data set has nothing of the options of the first."""
    name = options.get("name", config.name)
    if "image_size" in options and name not in (*SOURCES, "synthetic"):
        raise UsageError(
            f"data.image_size with data.name={name!r}: expected image files; the others have their "
            "own"
        )
    if name != config.name:
        return from_dict(DataConfig, dict(options), "data.")
    return dataclasses.replace(config, **options)
