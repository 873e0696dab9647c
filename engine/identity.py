"""Who a data set and a trained network are: what is compared before one stands for another.

All that finds, resumes, reports, evaluates or compares runs asks here. A record that is older than
one of these facts does not say it: that is unknown, None, and no difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import DataConfig
from .data import SOURCES, ImageData, load_data
from .data.source import digest_of_names
from .errors import DataError, DfptkdError
from .files import read_json, read_metadata

STUDENT_FILE, WEIGHTS_FILE = "student.safetensors", "teacher.safetensors"
"""The weights file of a finished run, of train and of train-teacher."""
SHORT = 8  # digits of a hash that a line shows
# What two runs of one folder must have in common. Not the number of test images: some may be
# skipped as they are in quarantine, which the run says.
OF_A_RUN = (
    "name", "num_classes", "class_names", "train_sha256", "test_sha256", "train_images",
    "image_size", "mean", "std",
)  # fmt: skip

DATA_FACTS = (
    "name", "classes", "train", "test", "num_classes", "train_images", "test_images", "image_size",
    "mean", "std",
)  # fmt: skip
"""The keys of `DataRecord.facts`."""


@dataclass(frozen=True)
class DataRecord:
    """A data set as a run has it."""

    name: str | None = None
    train_sha256: str | None = None
    """SHA-256 of all training images and labels (`data.DataIdentity`), whatever part a run uses."""
    test_sha256: str | None = None
    """The same of the test images."""
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    """By class number."""
    train_images: int | None = None
    """Those that the run trains on."""
    test_images: int | None = None
    """Those that it evaluates."""
    image_size: tuple[int, ...] | None = None
    """Height and width in pixels."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocessing: dict[str, Any] | None = None
    """`ImageData.preprocessing`: how the images are cut."""

    @classmethod
    def of(cls, data: ImageData) -> DataRecord:
        """The identity of data that are open."""
        return cls(
            data.name,
            None if data.identity is None else data.identity.train,
            None if data.identity is None else data.identity.test,
            data.num_classes,
            tuple(data.class_names),
            len(data.train),
            len(data.test),
            tuple(data.image_size),
            tuple(data.mean),
            tuple(data.std),
            data.preprocessing or None,
        )

    @classmethod
    def from_record(cls, values: Any) -> DataRecord:
        """The inverse of `record`; facts that are missing there, or make no sense, are unknown."""
        return cls(**_known(values, _DATA_KINDS))

    def record(self) -> dict[str, Any]:
        """The known facts as JSON data."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in found.items()
            if value is not None
        }

    def differences(self, here: DataRecord, names: Iterable[str] = OF_A_RUN) -> list[str]:
        """In which of the named facts two data sets are known to differ, a few words each."""
        pairs = ((name, getattr(self, name), getattr(here, name)) for name in names)
        return [_difference(*pair) for pair in pairs if None not in pair and pair[1] != pair[2]]

    def other_classes(self, here: DataRecord) -> list[str]:
        """Why labels of one are not labels of the other; empty: they are."""
        return self.differences(here, ("num_classes", "class_names"))[:1]

    def other_images(self, here: DataRecord, split: str) -> list[str]:
        """Why a split (`train` or `test`) is not of the same images; empty: it is, as far as is
        known: by their names where a data set does not say more."""
        name = f"{split}_sha256"
        both = None not in (getattr(self, name), getattr(here, name))
        return self.differences(here, (name if both else "name",))

    def facts(self) -> dict[str, Any]:
        """The known facts, each short enough for a label."""
        found = self.record()
        for split in ("train", "test"):
            if (sha256 := found.pop(f"{split}_sha256", None)) is not None:
                found[split] = sha256[:SHORT]
        if (names := found.pop("class_names", None)) is not None:
            found["classes"] = digest_of_names(names)[:SHORT]
        found.pop("preprocessing", None)  # `data.crops` says it
        return found

    def __str__(self) -> str:
        hashes = [h[:SHORT] for h in (self.train_sha256, self.test_sha256) if h is not None]
        content = f" ({', '.join(hashes)})" if hashes else ""
        counts = [
            f"{count:,} {what}"
            for count, what in (
                (self.train_images, "training images"),
                (self.test_images, "test images"),
                (self.num_classes, "classes"),
            )
            if count is not None
        ]
        return f"{self.name or 'data'}{content}{': ' if counts else ''}{', '.join(counts)}"


@dataclass(frozen=True)
class NetworkRecord:
    """A trained network, without its weights: what its file and its run say of it."""

    model: str | None = None
    data: DataRecord = field(default_factory=DataRecord)
    """The data set of its training."""
    epochs: float | None = None
    """Passes over these that it has had."""
    planned_epochs: int | None = None
    """Passes that its training was planned for."""
    top1: float | None = None
    """Test accuracy in percent, as its training measured it last."""
    extended: str | None = None
    """How its training was made longer than planned at first."""
    state: str | None = None
    """State of its run, where that is not finished."""

    def unfinished(self) -> str | None:
        """Why its training is not at its end; None: it is, as far as is known."""
        if self.epochs is not None and self.planned_epochs is not None:
            if self.epochs >= self.planned_epochs:
                return None
            return f"{self.epochs:.3g} of {self.planned_epochs} epochs done"
        return None if self.state is None else f"its run is {self.state}"

    def complaints(self, data: DataRecord) -> list[str]:
        """Why it is not the finished teacher of these data; empty: it is, as far as is known."""
        found = [self.unfinished()]
        other = self.data.other_classes(data) or self.data.other_images(data, "train")
        if other:
            found.append(f"trained on other data ({'; '.join(other)})")
        else:
            seen, wanted = self.data.train_images, data.train_images
            if seen is not None and wanted is not None and seen < wanted:
                found.append(f"trained on {seen:,} of these {wanted:,} training images")
        return [complaint for complaint in found if complaint is not None]

    def record(self) -> dict[str, Any]:
        """The known facts as JSON data; `metadata` has them as texts."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "data"}
        data = self.data.record()
        return {key: value for key, value in found.items() if value is not None} | (
            {"data": data} if data else {}
        )

    def metadata(self) -> dict[str, str]:
        """The same for the header of a safetensors file: texts, in an order of their own."""
        data = self.data.record()
        facts = {_IN_HEADER.get(key, key): value for key, value in data.items()}
        facts |= {key: value for key, value in self.record().items() if key != "data"}
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in sorted(facts.items())
        }

    def __str__(self) -> str:
        parts = []
        if self.epochs is not None:
            planned = "" if self.planned_epochs is None else f" of {self.planned_epochs}"
            parts.append(f"{self.epochs:.4g}{planned} epochs")
        if self.extended is not None:
            parts.append(self.extended)
        if self.top1 is not None:
            parts.append(f"top-1 {self.top1:.2f} %")
        return ", ".join(parts) or "nothing known of its training"


# Names of a data set's facts in the header of a weights file, where they stand beside a network's.
_IN_HEADER = {"name": "dataset"}


def same_model(name: str, other: str) -> bool:
    """Whether two names of models mean one: a name without a family is of the CIFAR zoo."""
    full = (n if ":" in n else f"cifar:{n}" for n in (name, other))
    return next(full) == next(full)


def network_of(path: Path) -> NetworkRecord:
    """The identity of a weights file, by its header and by the run that has left it.

    A file that says nothing, or cannot be read, is unknown.
    """
    header = _from_header(path)
    run = _from_run(path.parent) if path.name in (STUDENT_FILE, WEIGHTS_FILE) else None
    if run is None:
        return header
    own = {
        f.name: getattr(header, f.name)
        for f in fields(header)
        if f.name != "data" and getattr(header, f.name) is not None
    }
    if header.epochs is not None:  # the run may have gone on since it wrote the file
        own["state"] = None
    data = DataRecord(**_tuples(run.data.record() | header.data.record()))
    values = {f.name: getattr(run, f.name) for f in fields(run)}
    return NetworkRecord(**(values | own | {"data": data}))


def network_of_record(run: Mapping[str, Any], status: Mapping[str, Any]) -> NetworkRecord:
    """The network that a run trains, by its run.json and status.json."""
    config = run.get("config")
    config = config if isinstance(config, dict) else {}
    facts = {"model": config.get("student"), "planned_epochs": config.get("epochs")}
    state = status.get("state")
    if state == "finished":
        last = status.get("last")
        facts["epochs"] = status.get("epoch")
        facts["top1"] = last.get("student_top1") if isinstance(last, dict) else None
    else:
        facts["state"] = state
    data = DataRecord.from_record(run.get("data"))
    known = _known(facts, _NETWORK_KINDS)
    return NetworkRecord(data=data, extended=extensions_of(run), **known)


def extensions_of(values: Mapping[str, Any]) -> str | None:
    """How a run was made longer than it was planned, by its run.json or its checkpoint; or None."""
    try:
        texts = [extension_text(**entry) for entry in values.get("extended") or ()]
    except TypeError:  # a stranger's
        return None
    return "; ".join(texts) or None


def extension_text(before: int, after: int, step: int) -> str:
    """The words for a run whose number of epochs was changed on the way."""
    return f"extended from {before} to {after} epochs at step {step}"


def _from_run(folder: Path) -> NetworkRecord | None:
    try:
        run = read_json(folder / "run.json", "a run.json")
    except DataError:
        return None
    try:
        status = read_json(folder / "status.json", "a status.json")
    except DataError:
        status = {}
    if not isinstance(run, dict):
        return None
    return network_of_record(run, status if isinstance(status, dict) else {})


def _from_header(path: Path) -> NetworkRecord:
    try:
        header = read_metadata(path) if path.suffix == ".safetensors" else {}
    except DataError:
        header = {}
    facts = {key: _value(text) for key, text in header.items()}
    data = {name: facts.get(_IN_HEADER.get(name, name)) for name in _DATA_KINDS}
    return NetworkRecord(
        data=DataRecord.from_record(data), **_known(facts, _NETWORK_KINDS | {"extended": _text})
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def data_identity(config: DataConfig) -> DataRecord | None:
    """The identity of configured data; None: they cannot be opened here."""
    if config.name in SOURCES:  # none is decoded
        loader = config.loader if config.loader == "synthetic" else "torchvision"
        config = dataclasses.replace(config, loader=loader, keep_test=False)
    try:
        return DataRecord.of(load_data(config, torch.device("cpu")))
    except DfptkdError:
        return None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# Of facts out of files ---------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def _all(kind: Callable[[Any], Any]) -> Callable[[Any], tuple | None]:
    def several(value: Any) -> tuple | None:
        found = tuple(map(kind, value)) if isinstance(value, (list, tuple)) else ()
        return found if found and None not in found else None

    return several


_DATA_KINDS: dict[str, Callable[[Any], Any]] = {
    "name": _text,
    "train_sha256": _text,
    "test_sha256": _text,
    "num_classes": _count,
    "class_names": _all(_text),
    "train_images": _count,
    "test_images": _count,
    "image_size": _all(_count),
    "mean": _all(_number),
    "std": _all(_number),
    "preprocessing": lambda value: value if isinstance(value, dict) else None,
}
_NETWORK_KINDS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "epochs": _number,
    "planned_epochs": _count,
    "top1": _number,
    "state": _text,
}


def _known(values: Any, kinds: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Those of some facts that make sense."""
    values = values if isinstance(values, dict) else {}
    found = {name: kind(values.get(name)) for name, kind in kinds.items()}
    return {name: value for name, value in found.items() if value is not None}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


_WORDS = {
    "name": "data set",
    "train_sha256": "SHA-256 of the training images",
    "test_sha256": "SHA-256 of the test images",
    "std": "standard deviation",
}


def _difference(name: str, there: Any, here: Any) -> str:
    """A few words for a fact that is not the same."""
    if name == "class_names":
        return _difference_of_names(there, here)
    if name.endswith("_sha256"):
        there, here = there[:SHORT], here[:SHORT]
    what = _WORDS.get(name, name)
    return f"{what.replace('_', ' ')} {_plain(there)} there, {_plain(here)} here"


def _difference_of_names(there: Sequence[str], here: Sequence[str]) -> str:
    if len(there) != len(here):
        return f"{len(there)} classes there, {len(here)} here"
    first = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    return f"class {first} is {there[first]!r} there, {here[first]!r} here"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
