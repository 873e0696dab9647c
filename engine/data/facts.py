"""Number, size and classes of the images of a run, for plans that must not need the data."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass

from ..config import DataConfig
from ..errors import DataError, UsageError
from .crops import crop_rule
from .file_data import SOURCES, check_loader, choose_loader, find_files, find_rule
from .look import look_into
from .source import num_forms, split_limits


@dataclass(frozen=True)
class DataFacts:
    """What a plan must know of the data."""

    train_images: int
    test_images: int
    num_classes: int
    image_size: int
    """Side in pixels."""
    resident: bool
    """Whether both splits lie on the device as a whole."""
    source: str
    """Where the numbers come from."""
    crop_padding: int = 0
    """Of the random crop in pixels, unless configured."""

    def forms(self, data: DataConfig) -> int | None:
        """`Split.num_forms` of the training images."""
        if data.name in SOURCES and not self.resident:
            return None
        padding = self.crop_padding if data.crop_padding is None else data.crop_padding
        return num_forms(padding, data.flip)


KNOWN = {
    "cifar10": DataFacts(50_000, 10_000, 10, 32, True, "CIFAR-10", 4),
    "cifar100": DataFacts(50_000, 10_000, 100, 32, True, "CIFAR-100", 4),
    "fashion_mnist": DataFacts(60_000, 10_000, 10, 28, True, "Fashion-MNIST", 2),
}
# Image files: training and test images, classes, how `auto` cuts them
_IMAGENET = (1_281_167, 50_000, 1000)
_FILES = {
    "imagenet": (_IMAGENET, "photographs"),
    "cub200": ((5_994, 5_794, 200), "photographs"),
    "tiny_imagenet": ((100_000, 10_000, 200), "small"),
}


def published_classes(name: str) -> int | None:
    """How many classes a data set has as it was published; None: it is the user's own."""
    if name in KNOWN:
        return KNOWN[name].num_classes
    return _FILES[name][0][2] if name in _FILES else None


def data_facts(data: DataConfig) -> DataFacts:
    """Number, size and classes of the images; of files the headers of some are read.

    Raises:
        DataError: Image files of unknown number, or such as were named and are missing or broken.
    """
    if data.name in SOURCES:
        facts = _facts_of_files(data)
    elif data.name == "synthetic":
        facts = DataFacts(50_000, 10_000, data.num_classes, data.image_size, False, "synthetic")
    else:
        facts = KNOWN[data.name]
    train, test = split_limits(data)
    return dataclasses.replace(
        facts,
        train_images=min(facts.train_images, train or facts.train_images),
        test_images=min(facts.test_images, test or facts.test_images),
    )


def _facts_of_files(data: DataConfig) -> DataFacts:
    check_loader(data)
    root, found, kind = data.root, None, "photographs"
    if root:
        found = find_files(data)
    elif os.environ.get("DFPTKD_DATA"):
        root = os.environ["DFPTKD_DATA"]
        with suppress(DataError, UsageError):  # it holds some other data set
            found = find_files(dataclasses.replace(data, root=root))
    if found is not None:
        counts = (len(found.train), len(found.test), len(found.class_names))
        rule, _ = find_rule(data, [look_into(files) for files in (found.train, found.test)])
        kind = rule.kind
        source = f"counted in {root}"
    elif data.name in _FILES:
        counts, kind = _FILES[data.name]
        source = f"{data.name}'s published numbers"
    elif data.num_classes == _IMAGENET[2]:
        counts, source = _IMAGENET, "ImageNet's, no image folder given"
    else:
        raise DataError(
            f"{data.name} data of {data.num_classes} classes: expected --data.root, to count its "
            f"images (of {_IMAGENET[2]} classes ImageNet's are assumed)"
        )
    if data.crops != "auto":
        kind = data.crops
    rule = crop_rule(kind, data.image_size, data.crop_padding)
    resident = choose_loader(data, rule, counts[0] + counts[1]) == "device" and rule.is_fixed
    return DataFacts(*counts, data.image_size, resident, source, rule.shift)
