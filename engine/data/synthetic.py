"""Synthetic images for benchmarks and trials: no files, no memory, each batch made from the hash.

Every image is uniform noise around a colour that its class has: enough for a net to learn from.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from .order import Stream, hash_bits, integers
from .source import (
    Augmentation,
    Batch,
    DataIdentity,
    ImageData,
    Split,
    digest_of_names,
    split_limits,
    spread_over_classes,
)

_NUM_TRAIN, _NUM_TEST = 50_000, 10_000
# The data set is the same for every seed of a run; its splits hash like two epochs of seed 0.
_DATA_SEED, _TRAIN, _TEST = 0, 0, 1


def load_synthetic(config: DataConfig, device: torch.device) -> ImageData:
    """50,000 training and 10,000 test images, cut to the configured limits, made on `device`."""
    train_limit, test_limit = split_limits(config)
    class_names = [str(i) for i in range(config.num_classes)]
    made_from = f"synthetic images of {config.image_size} pixels, {config.num_classes} classes"
    return ImageData(
        name=config.name,
        train=SyntheticSplit(config, device, _TRAIN, _NUM_TRAIN, train_limit),
        test=SyntheticSplit(config, device, _TEST, _NUM_TEST, test_limit),
        num_classes=config.num_classes,
        class_names=class_names,
        image_size=(config.image_size, config.image_size),
        mean=(0.498, 0.498, 0.498),  # half of (noise + colour), both uniform in 0..255
        std=(0.2, 0.2, 0.2),
        pipeline={"loader": "synthetic"},
        identity=DataIdentity(
            digest_of_names(class_names),
            digest_of_names([made_from, "train"]),
            digest_of_names([made_from, "test"]),
        ),
    )


class SyntheticSplit(Split):
    """A split whose images are a function of their number; the crop is off unless configured."""

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        which: int,
        num_samples: int,
        limit: int | None,
    ):
        ids = torch.arange(num_samples)
        bits = hash_bits(_DATA_SEED, which, ids, Stream.SYNTHETIC_LABEL)
        labels = integers(bits, config.num_classes)
        chosen = spread_over_classes(labels, limit)
        self.ids = ids[chosen].to(device)
        self.labels = labels[chosen].to(device)
        self.which = which
        self.image_size = config.image_size
        self.augmentation = None
        if which == _TRAIN:
            self.augmentation = Augmentation(
                len(self.ids), config.crop_padding or 0, config.flip, device
            )

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`."""
        indices = indices.to(self.labels.device, non_blocking=True)
        crop, flip = self.augmentation(indices, seed, epoch) if self.augmentation else (None, None)
        labels = self.labels[indices]
        images = synthetic_images(self.ids[indices], labels, side or self.image_size, self.which)
        return Batch(images, labels, crop, flip, indices)

    def describe(self) -> dict[str, Any]:
        """See `Split.describe`."""
        return {"loader": "synthetic"}

    @property
    def num_forms(self) -> int:
        """See `Split.num_forms`."""
        return 1 if self.augmentation is None else self.augmentation.num_forms

    def content(self) -> str:
        """See `Split.content`; of what the images are made of, which says as much."""
        digest = hashlib.sha256(f"synthetic {self.which} {self.image_size}".encode())
        for numbers in (self.ids, self.labels):
            digest.update(numbers.cpu().numpy().tobytes())
        return digest.hexdigest()


class SyntheticBank(Split):
    """A few synthetic images in place of those of a real data set, with its labels and its order:
    what a run would do if decoding cost nothing.

    Args:
        labels: int64 [N], of the real samples.
        side: Of the images, in pixels, unless asked for another.
        device: Where they lie.
        flip: Whether half of the images are to be mirrored.
    """

    SIZE = 64

    def __init__(self, labels: Tensor, side: int, device: torch.device, *, flip: bool) -> None:
        self.labels, self.side, self.device = labels.to(device), side, device
        self.augmentation = Augmentation(len(labels), 0, flip, device)
        self._banks: dict[int, Tensor] = {}

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`."""
        side = side or self.side
        if side not in self._banks:
            ids = torch.arange(self.SIZE, device=self.device)
            self._banks[side] = synthetic_images(ids, ids, side, _TRAIN)
        indices = indices.to(self.device, non_blocking=True)
        _, flip = self.augmentation(indices, seed, epoch)
        images = self._banks[side].index_select(0, indices % self.SIZE)
        return Batch(images, self.labels[indices], None, flip, indices)

    def describe(self) -> dict[str, Any]:
        """See `Split.describe`."""
        return {"loader": "synthetic"}


def synthetic_images(ids: Tensor, labels: Tensor, side: int, which: int) -> Tensor:
    """uint8 [B, side, side, 3] of the images `ids` of classes `labels`, both int64 [B]."""
    num_bytes = side * side * 3
    words = math.ceil(num_bytes / 8)  # a hash gives 8 pixels
    counters = ids[:, None] * words + torch.arange(words, device=ids.device)
    noise = hash_bits(_DATA_SEED, which, counters, Stream.SYNTHETIC_PIXELS)
    noise = noise.view(torch.uint8)[:, :num_bytes].view(-1, side, side, 3)
    channels = torch.arange(3, device=ids.device)
    colours = hash_bits(_DATA_SEED, 0, labels[:, None] * 3 + channels, Stream.SYNTHETIC_COLOUR)
    colours = integers(colours, 256).to(torch.uint8)  # [B, 3]
    return (noise >> 1) + (colours >> 1)[:, None, None, :]
