"""Number, size and classes of the images of a run, for plans that must not need the data."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DataConfig
from ..errors import DataError
from .loader import load_data
from .source import split_limits


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


KNOWN = {
    "cifar10": DataFacts(50_000, 10_000, 10, 32, True, "CIFAR-10", 4),
    "cifar100": DataFacts(50_000, 10_000, 100, 32, True, "CIFAR-100", 4),
    "fashion_mnist": DataFacts(60_000, 10_000, 10, 28, True, "Fashion-MNIST", 2),
    "cub200": DataFacts(5_994, 5_794, 200, 224, False, "CUB-200-2011, official split"),
    "tiny_imagenet": DataFacts(100_000, 10_000, 200, 64, False, "Tiny ImageNet", 4),
}
IMAGENET_IMAGES, IMAGENET_CLASSES = (1_281_167, 50_000), 1000
SIZED = ("cub200", "tiny_imagenet")
"""Data sets whose images are brought to `data.image_size`."""


def data_facts(data: DataConfig) -> DataFacts:
    """Number, size and classes of the images, without reading one.

    Raises:
        DataError: An image folder of unknown size, or one that was named and is missing or broken.
    """
    if data.name == "folder":
        root = data.root or _image_folder_of_environment()
        if root:
            found = load_data(dataclasses.replace(data, root=root), torch.device("cpu"))
            counts, classes = (len(found.train), len(found.test)), found.num_classes
            return DataFacts(*counts, classes, data.image_size, False, f"counted in {root}")
        if data.num_classes != IMAGENET_CLASSES:
            raise DataError(
                f"an image folder of {data.num_classes} classes: expected --data.root, to count "
                f"its images (of {IMAGENET_CLASSES} classes ImageNet's are assumed)"
            )
        source = "ImageNet's, no image folder given"
        facts = DataFacts(*IMAGENET_IMAGES, IMAGENET_CLASSES, data.image_size, False, source)
    elif data.name in ("imagenet", "webdataset"):
        if data.num_classes != IMAGENET_CLASSES:
            raise DataError(
                f"data.num_classes={data.num_classes} of {data.name}: expected {IMAGENET_CLASSES}, "
                "whose number of images is known"
            )
        facts = DataFacts(
            *IMAGENET_IMAGES, IMAGENET_CLASSES, data.image_size, False, "ImageNet-1k's"
        )
    elif data.name == "synthetic":
        facts = DataFacts(50_000, 10_000, data.num_classes, data.image_size, False, "synthetic")
    else:
        facts = KNOWN[data.name]
        if data.name in SIZED:
            facts = dataclasses.replace(facts, image_size=data.image_size)
    train, test = split_limits(data)
    return dataclasses.replace(
        facts,
        train_images=min(facts.train_images, train or facts.train_images),
        test_images=min(facts.test_images, test or facts.test_images),
    )


def _image_folder_of_environment() -> str | None:
    """DFPTKD_DATA, where it holds an image folder and not some other data set."""
    root = os.environ.get("DFPTKD_DATA")
    return root if root and (Path(root).expanduser() / "train").is_dir() else None
