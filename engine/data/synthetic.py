"""Synthetic images for benchmarks and trials: no files, no memory, each batch made from the hash.

Every image is uniform noise around a colour that its class has: enough for a net to learn from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import DataConfig
from .order import Stream, hash_bits, integers
from .source import Augmentation, Batch, ImageData, Split, split_limits, spread_over_classes

_NUM_TRAIN, _NUM_TEST = 50_000, 10_000
# The data set is the same for every seed of a run; its splits hash like two epochs of seed 0.
_DATA_SEED, _TRAIN, _TEST = 0, 0, 1


def load_synthetic(config: DataConfig, device: torch.device) -> ImageData:
    """50,000 training and 10,000 test images, cut to the configured limits, made on `device`."""
    train_limit, test_limit = split_limits(config)
    return ImageData(
        name=config.name,
        train=SyntheticSplit(config, device, _TRAIN, _NUM_TRAIN, train_limit),
        test=SyntheticSplit(config, device, _TEST, _NUM_TEST, test_limit),
        num_classes=config.num_classes,
        class_names=[str(i) for i in range(config.num_classes)],
        image_size=(config.image_size, config.image_size),
        mean=(0.498, 0.498, 0.498),  # half of (noise + colour), both uniform in 0..255
        std=(0.2, 0.2, 0.2),
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

    def batch(self, indices: Tensor, *, seed: int, epoch: int) -> Batch:
        """See `Split.batch`."""
        indices = indices.to(self.labels.device, non_blocking=True)
        crop, flip = self.augmentation(indices, seed, epoch) if self.augmentation else (None, None)
        labels = self.labels[indices]
        return Batch(self._images(self.ids[indices], labels), labels, crop, flip, indices)

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3]."""
        side = self.image_size
        num_bytes = side * side * 3
        words = math.ceil(num_bytes / 8)  # a hash gives 8 pixels
        counters = ids[:, None] * words + torch.arange(words, device=ids.device)
        noise = hash_bits(_DATA_SEED, self.which, counters, Stream.SYNTHETIC_PIXELS)
        noise = noise.view(torch.uint8)[:, :num_bytes].view(-1, side, side, 3)
        channels = torch.arange(3, device=ids.device)
        colours = hash_bits(_DATA_SEED, 0, labels[:, None] * 3 + channels, Stream.SYNTHETIC_COLOUR)
        colours = integers(colours, 256).to(torch.uint8)  # [B, 3]
        return (noise >> 1) + (colours >> 1)[:, None, None, :]
