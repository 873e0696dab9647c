"""Where an image is cut: a box of the source image that is then resized to a square.

A box is a pure function of (seed, epoch, sample) and of the image's size, so that every loader,
number of workers and number of ranks cuts alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .order import Stream, hash_bits, uniforms

_SCALE = (0.08, 1.0)  # share of the image's area
_RATIO = (3 / 4, 4 / 3)  # width over height
_ATTEMPTS = 10  # torchvision's number of tries before it falls back to a central crop
_DRAWS = 4  # of one attempt: area, ratio, row, column
_LARGEST_SMALL = 96  # pixels, of the longer side: STL-10's
_ONE_SIZE = 0.125  # by how much sides of about one size differ from the usual one
_NEARLY_ALL = 0.95  # of the images: a stray one does not change how all are cut


class Crops(ABC):
    """A rule of cutting."""

    cut_first = False
    """True: crop, then resize the crop by itself (whole pixels). False: the box of an image that is
    resized as a whole, whose edges see the pixels beyond."""

    @abstractmethod
    def boxes(self, samples: Tensor, sizes: Tensor, *, seed: int, epoch: int, side: int) -> Tensor:
        """Boxes in pixels of the source images.

        Args:
            samples: int64 [B], sample numbers.
            sizes: int64 [B, 2], height and width of each image.
            seed: Seed of the run.
            epoch: Epoch from 0.
            side: Of the square that a box is resized to, in pixels.

        Returns:
            float64 [B, 4]: top, left, height, width.
        """


@dataclass(frozen=True)
class RandomResizedCrop(Crops):
    """torchvision's RandomResizedCrop (scale 0.08..1, ratio 3/4..4/3), drawn from the hash."""

    cut_first = True

    def boxes(self, samples: Tensor, sizes: Tensor, *, seed: int, epoch: int, side: int) -> Tensor:
        per_sample = _ATTEMPTS * _DRAWS
        counters = samples[:, None] * per_sample + torch.arange(per_sample)
        draws = uniforms(hash_bits(seed, epoch, counters, Stream.RESIZED_CROP))
        u_area, u_ratio, u_row, u_column = draws.view(-1, _ATTEMPTS, _DRAWS).unbind(2)
        height, width = sizes.double()[:, None].unbind(2)  # [B, 1]
        area = height * width * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * u_area)
        # uniform in the logarithm, so that a box is as often tall as it is wide
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** u_ratio
        box_width, box_height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top = (u_row * (height - box_height + 1)).floor()
        left = (u_column * (width - box_width + 1)).floor()
        fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
        first = fits.to(torch.uint8).argmax(dim=1)  # the first attempt that fits
        boxes = torch.stack([top, left, box_height, box_width], dim=2)[
            torch.arange(len(samples)), first
        ]
        for row in (~fits.any(dim=1)).nonzero()[:, 0].tolist():
            boxes[row] = torch.tensor(_central_box(*sizes[row].tolist()))
        return boxes


@dataclass(frozen=True)
class CenterCrop(Crops):
    """Resize of the short side to `resize` times `side`, then the square in the middle."""

    resize: float = 256 / 224

    def boxes(self, samples: Tensor, sizes: Tensor, *, seed: int, epoch: int, side: int) -> Tensor:
        short = round(side * self.resize)
        resized = (short * sizes.double() / sizes.min(dim=1, keepdim=True).values).floor()
        offset = ((resized - side) / 2).round()  # torchvision's rounding
        scale = sizes / resized
        return torch.cat([offset * scale, side * scale], dim=1)


@dataclass(frozen=True)
class StretchedCrop(Crops):
    """Resize to a square of 256/224 of `side`, whatever the shape, then a crop of it: at random in
    training, else in the middle (CUB-200's protocol)."""

    random: bool

    def boxes(self, samples: Tensor, sizes: Tensor, *, seed: int, epoch: int, side: int) -> Tensor:
        square = round(side * 256 / 224)
        if self.random:
            draws = [
                uniforms(hash_bits(seed, epoch, samples, stream))
                for stream in (Stream.CROP_ROW, Stream.CROP_COLUMN)
            ]
            offset = (torch.stack(draws, dim=1) * (square - side + 1)).floor()
        else:
            offset = torch.full((len(samples), 2), round((square - side) / 2), dtype=torch.float64)
        scale = sizes.double() / square
        return torch.cat([offset * scale, side * scale], dim=1)


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Of an image too narrow or too flat: the largest central box of an admitted ratio."""
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    box_width = max(min(width, round(height * ratio)), 1)
    box_height = max(min(height, round(width / ratio)), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


# Which rule a data set gets -----------------------------------------------------------------------


@dataclass(frozen=True)
class CropRule:
    """How the images of a data set are cut, by every loader."""

    kind: str
    """photographs, small or stretched."""
    train: Crops
    test: Crops
    shift: int = 0
    """Padding in pixels, out of which a training image is cut at random."""

    @property
    def is_fixed(self) -> bool:
        """Whether a training image is cut alike in every epoch, but for its shift."""
        return self.train == self.test

    def describe(self, side: int, flip: bool) -> dict[str, Any]:
        """The rule as JSON data; arguments as of `in_words`."""
        return {"crops": self.kind, "side": side, "shift": self.shift, "flip": flip}

    def in_words(self, side: int, flip: bool) -> str:
        """The rule as a sentence: the cut in training, and in evaluation.

        Args:
            side: Of the squares that come out, in pixels.
            flip: Whether half of the training images are mirrored.
        """
        flipped = ", flipped" if flip else ""
        if self.kind == "small":
            shifted = f" shifted by up to {self.shift} pixels{flipped}" if self.shift else flipped
            return f"whole at {side} pixels, for training{shifted or ' as they are'}"
        resized = round(side * 256 / 224)
        if self.kind == "stretched":
            return (
                f"stretched to {resized}x{resized} pixels, for training random crops of {side}"
                f"{flipped}, for evaluation the central {side}"
            )
        return (
            f"for training random crops of {_SCALE[0]:.0%} to {_SCALE[1]:.0%} of the area at "
            f"{side} pixels{flipped}, for evaluation resized to {resized} and the central {side}"
        )


def crop_rule(kind: str, side: int, padding: int | None) -> CropRule:
    """The rule of a kind of images.

    Args:
        kind: photographs, small or stretched.
        side: Of the squares that come out, in pixels.
        padding: Of small images in training, in pixels; None: an eighth of their side.

    Raises:
        UsageError: There is no such kind.
    """
    if kind == "stretched":
        return CropRule(kind, StretchedCrop(random=True), StretchedCrop(random=False))
    if kind == "photographs":
        return CropRule(kind, RandomResizedCrop(), CenterCrop())
    if kind != "small":
        raise UsageError(f"data.crops={kind!r}: expected auto, photographs, small or stretched")
    whole = CenterCrop(resize=1.0)
    return CropRule(kind, whole, whole, side // 8 if padding is None else padding)


def kind_of_images(sizes: Sequence[tuple[int, int]]) -> str:
    """small: nearly all are of about one size, of at most 96 pixels; else photographs.

    Images of one small size were cut and resized before, as those of CIFAR (32), Tiny-ImageNet (64)
    and STL-10 (96) were: another crop would take from what is left.

    Args:
        sizes: Height and width of some images.
    """
    if not sizes:
        return "photographs"
    measured = torch.tensor(sizes).double()
    usual = measured.median(dim=0).values
    alike = ((measured - usual).abs() <= _ONE_SIZE * usual).all(dim=1)
    small = usual.max() <= _LARGEST_SMALL and alike.double().mean() >= _NEARLY_ALL
    return "small" if small else "photographs"


def crops_of_record(data: Mapping[str, Any]) -> str:
    """`data.crops` of a run on disk; of one that is older than the option, what it did then.

    Args:
        data: The part "data" of the run's configuration.
    """
    name, loader = data.get("name"), data.get("loader")
    if "crops" in data:
        return data["crops"]
    if name not in ("folder", "imagenet", "cub200", "tiny_imagenet", "webdataset"):
        return "auto"
    if name == "tiny_imagenet" and loader in ("auto", "device"):
        return "small"
    if loader == "device":  # that stretched photographs: not to be repeated
        return "auto"
    return "stretched" if name == "cub200" else "photographs"


def sizes_in_words(sizes: Sequence[tuple[int, int]]) -> str:
    """Height and width of images that are all alike, else the range of their sides."""
    if len(set(sizes)) == 1:
        return "{}x{} pixels".format(*sizes[0])
    sides = [side for size in sizes for side in size]
    return f"sides of {min(sides)} to {max(sides)} pixels" if sides else "of unknown size"


def side_of_epoch(
    epoch: int, epochs: int, start: int | None, ramp: tuple[float, ...], end: int
) -> int:
    """Side of the training images in an epoch, in pixels: progressive resizing.

    It grows from `start` to `end` between the shares `ramp` of the run, in steps of 32 pixels, as
    each side is another compiled graph.
    """
    if start is None:
        return end
    share = (epoch / max(epochs, 1) - ramp[0]) / (ramp[1] - ramp[0])
    if share >= 1:
        return end
    grown = start + math.floor(max(share, 0.0) * (end - start) / 32) * 32
    return min(grown, end)
