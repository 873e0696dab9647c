"""Number, size and classes of the images of a run, for plans that must not need the data."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass

from ..config import DataConfig
from ..errors import DataError, UsageError
from .file_data import SOURCES, choose_loader, find_files
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
# Image files: training and test images, classes
_IMAGENET = (1_281_167, 50_000, 1000)
_FILES = {
    "imagenet": _IMAGENET,
    "cub200": (5_994, 5_794, 200),
    "tiny_imagenet": (100_000, 10_000, 200),
}


def published_classes(name: str) -> int | None:
    """How many classes a data set has as it was published; None: it is the user's own."""
    if name in KNOWN:
        return KNOWN[name].num_classes
    return _FILES[name][2] if name in _FILES else None


def data_facts(data: DataConfig) -> DataFacts:
    """Number, size and classes of the images, without reading one.

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
    root, found = data.root, None
    if root:
        found = find_files(data)
    elif os.environ.get("DFPTKD_DATA"):
        root = os.environ["DFPTKD_DATA"]
        with suppress(DataError, UsageError):  # it holds some other data set
            found = find_files(dataclasses.replace(data, root=root))
    if found is not None:
        counts = (len(found.train), len(found.test), len(found.class_names))
        source = f"counted in {root}"
    elif data.name in _FILES:
        counts, source = _FILES[data.name], f"{data.name}'s published numbers"
    elif data.num_classes == _IMAGENET[2]:
        counts, source = _IMAGENET, "ImageNet's, no image folder given"
    else:
        raise DataError(
            f"{data.name} data of {data.num_classes} classes: expected --data.root, to count its "
            f"images (of {_IMAGENET[2]} classes ImageNet's are assumed)"
        )
    resident = choose_loader(data) == "device"
    padding = data.image_size // 8 if resident else 0
    return DataFacts(*counts, data.image_size, resident, source, padding)
