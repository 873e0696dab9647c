"""Image folders, root/train/<class>/* and root/val/<class>/*, cropped like ImageNet.

Training: RandomResizedCrop (scale 0.08..1, ratio 3/4..4/3), flip left to the normalisation kernel.
Evaluation: Resize to 256/224 of the crop, CenterCrop. The crop is a pure function of
(seed, epoch, sample), so batches are bit-equal for any number of worker processes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..config import DataConfig
from ..errors import DataError
from .order import Stream, flips, hash_bits, uniforms
from .source import Batch, DecodingSplit, ImageData, find_root, split_limits, spread_over_classes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LAYOUT = "train/<class>/<image> and val/<class>/<image> (or test/ in place of val/)"
_SCALE = (0.08, 1.0)  # share of the image's area
_RATIO = (3 / 4, 4 / 3)  # width over height
_ATTEMPTS = 10  # torchvision's number of tries before it falls back to a central crop
_DRAWS = 4  # of one attempt: area, ratio, row, column


def load_folder(config: DataConfig, device: torch.device) -> ImageData:
    """An image folder; batches are decoded on the CPU and land on `device`.

    Raises:
        DataError: a split, class or image is missing, or the splits have different classes.
    """
    root = find_root(config.root, _LAYOUT)
    train_folder, test_folder = _split_folders(root)
    class_names = _class_names(train_folder)
    _check_same_classes(train_folder, class_names, test_folder, _class_names(test_folder))
    train_limit, test_limit = split_limits(config)

    def split(folder: Path, limit: int | None, training: bool) -> FolderSplit:
        names, labels = _list_images(folder, class_names)
        chosen = spread_over_classes(labels, limit)
        return FolderSplit(
            folder, names[chosen.numpy()], labels[chosen], config, device, training=training
        )

    return ImageData(
        name=config.name,
        train=split(train_folder, train_limit, training=True),
        test=split(test_folder, test_limit, training=False),
        num_classes=len(class_names),
        class_names=class_names,
        image_size=(config.image_size, config.image_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


class FolderSplit(DecodingSplit):
    """A split whose images are decoded when a batch asks for them."""

    def __init__(
        self,
        folder: Path,
        names: np.ndarray,
        labels: Tensor,
        config: DataConfig,
        device: torch.device,
        *,
        training: bool,
    ):
        self.folder = folder
        self.names = names  # bytes [N], paths below the folder
        self.labels = labels  # int64 [N], on the CPU, where workers choose
        self.device = device
        self.image_size = config.image_size
        self.flip = config.flip and training
        self.training = training

    def decode(self, indices: Tensor, *, seed: int, epoch: int) -> Batch:
        """See `DecodingSplit.decode`."""
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, sample in enumerate(indices.tolist()):
            image = open_rgb(self.folder / os.fsdecode(self.names[sample]))
            images[row] = self._cropped(image, sample, seed, epoch)
        flip = flips(seed, epoch, indices) if self.flip else None
        return Batch(torch.from_numpy(images), self.labels[indices], None, flip, indices)

    def _cropped(self, image: Image.Image, sample: int, seed: int, epoch: int) -> np.ndarray:
        """uint8 [image_size, image_size, 3]."""
        size = self.image_size
        if self.training:
            box = random_box(seed, epoch, sample, image.height, image.width)
            return np.asarray(functional.resized_crop(image, *box, [size, size], antialias=True))
        resized = functional.resize(image, [round(size * 256 / 224)], antialias=True)
        return np.asarray(functional.center_crop(resized, [size, size]))


def random_box(
    seed: int, epoch: int, sample: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop, drawn from the hash.

    Args:
        sample: sample number within the split.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        top, left, height and width of the box, in pixels.
    """
    counters = sample * _ATTEMPTS * _DRAWS + torch.arange(_ATTEMPTS * _DRAWS)
    draws = uniforms(hash_bits(seed, epoch, counters, Stream.RESIZED_CROP))
    for u_area, u_ratio, u_row, u_column in draws.view(_ATTEMPTS, _DRAWS).tolist():
        area = height * width * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * u_area)
        # uniform in the logarithm, so that a box is as often tall as it is wide
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** u_ratio
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(u_row * (height - box_height + 1))
            left = int(u_column * (width - box_width + 1))
            return top, left, box_height, box_width
    # an image too narrow or too flat: the largest central box of an admitted ratio
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    box_width = max(min(width, round(height * ratio)), 1)
    box_height = max(min(height, round(width / ratio)), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def open_rgb(path: Path) -> Image.Image:
    """The image as 8-bit RGB.

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded as an image ({reason})") from error


def _split_folders(root: Path) -> tuple[Path, Path]:
    train = root / "train"
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not train.is_dir():
        raise DataError(f"{root}: found no folder train/, expected {_LAYOUT}")
    if not tests:
        raise DataError(f"{root}: found train/ but neither val/ nor test/, expected {_LAYOUT}")
    return train, tests[0]


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder}: found {len(names)} class folders, expected at least 2")
    return names


def _check_same_classes(
    train_folder: Path, train_names: list[str], test_folder: Path, test_names: list[str]
) -> None:
    for folder, missing in (
        (test_folder, sorted(set(train_names) - set(test_names))),
        (train_folder, sorted(set(test_names) - set(train_names))),
    ):
        if missing:
            raise DataError(
                f"{folder}: lacks {len(missing)} classes of the other split, first {missing[0]!r}, "
                f"expected the same classes in {train_folder.name}/ and {test_folder.name}/"
            )


def _list_images(folder: Path, class_names: list[str]) -> tuple[np.ndarray, Tensor]:
    """Paths below `folder` as bytes [N], class by class in sorted order, and int64 labels [N].

    One array rather than a list: forked workers would otherwise copy a million strings by touching
    their reference counts.
    """
    paths: list[bytes] = []
    counts = []
    for name in class_names:
        with os.scandir(folder / name) as entries:
            files = sorted(e.name for e in entries if e.name.lower().endswith(_SUFFIXES))
        if not files:
            raise DataError(
                f"{folder / name}: no image, expected files named {' '.join(_SUFFIXES)}"
            )
        paths += [os.fsencode(f"{name}/{file}") for file in files]
        counts.append(len(files))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return np.array(paths), labels
