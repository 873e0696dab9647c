"""What every data source hands over: an ImageData of two splits that give batches of raw images."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from .crops import crop_rule
from .order import crop_offsets, flips

_HASHED_IMAGES = 4096  # at once


@dataclass(frozen=True)
class Batch:
    """Raw images with what `kernels.normalize_images` needs to crop and flip them on the fly."""

    images: Tensor
    """uint8 [B, H, W, 3]."""
    labels: Tensor
    """int64 [B]."""
    crop: tuple[int, Tensor] | None
    """(padding in pixels, offsets int64 [B, 2]: row, column in 0..2 * padding); None: no crop."""
    flip: Tensor | None
    """bool [B]; None: no flip."""
    indices: Tensor
    """int64 [B], sample numbers within the (limited) split."""

    def places(self) -> Tensor:
        """int64 [B]: for each image in the form that its crop and flip give it, its number among
        all of the split: sample, flip, row, column, the last running fastest."""
        place = self.indices
        if self.flip is not None:
            place = 2 * place + self.flip
        if self.crop is not None:
            padding, offsets = self.crop
            side = 2 * padding + 1
            place = (place * side + offsets[:, 0]) * side + offsets[:, 1]
        return place

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; asynchronous out of pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def clone(self) -> Batch:
        """A copy in memory of its own."""
        return self._map(Tensor.clone)

    def copy_(self, other: Batch) -> None:
        """Overwrite every tensor with that of `other`, of the same shapes."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)

    @staticmethod
    def copy_all_(targets: Sequence[Batch], sources: Sequence[Batch]) -> None:
        """`copy_` for many batches, in one call for each kind of tensor."""
        columns = (zip(*(b.tensors() for b in found), strict=True) for found in (targets, sources))
        for mine, theirs in zip(*columns, strict=True):
            torch._foreach_copy_(mine, theirs, non_blocking=True)

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """The images of all as one batch, in memory of its own."""
        columns = zip(*(batch.tensors() for batch in batches), strict=True)
        return batches[0]._with(map(torch.cat, columns))

    def chunk(self, parts: int) -> list[Batch]:
        """Views of so many equal parts."""
        rows = zip(*(tensor.chunk(parts) for tensor in self.tensors()), strict=True)
        return [self._with(row) for row in rows]

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` reads the batch."""
        self._map(lambda tensor: tensor.record_stream(stream))

    def tensors(self) -> list[Tensor]:
        """All that it holds, in the order of its fields."""
        offsets = None if self.crop is None else self.crop[1]
        values = (self.images, self.labels, offsets, self.flip, self.indices)
        return [value for value in values if value is not None]

    def _map(self, function: Any) -> Batch:
        return self._with(map(function, self.tensors()))

    def _with(self, tensors: Iterable[Tensor]) -> Batch:
        """Other tensors in the places of its own, in the order of `tensors`."""
        new = iter(tensors)
        images, labels = next(new), next(new)
        crop = None if self.crop is None else (self.crop[0], next(new))
        flip = None if self.flip is None else next(new)
        return Batch(images, labels, crop, flip, next(new))


class Split(ABC):
    """One split of a data set; a source subclasses it."""

    labels: Tensor
    """int64 [N], on the device where indices are cheapest."""
    listed: Tensor | None = None
    """bool [N], on the CPU: images in quarantine, which training replaces."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """The samples `indices` on the run's device, augmented if this is a training split.

        Args:
            indices: int64 [B], sample numbers in 0..N-1.
            seed: seed of the run.
            epoch: epoch from 0; with `seed` and the sample number it fixes the augmentation.
            side: of the images, in pixels, where the split makes them to measure; None: its own.
        """

    def stream(
        self,
        rows: Sequence[Tensor],
        *,
        seed: int,
        epoch: int,
        workers: int = 0,
        side: int | None = None,
    ) -> Iterator[Batch]:
        """The batches of `rows` (int64 [B] each) in their order, made ahead of time where that is
        worth it.

        Args:
            rows: sample numbers of each batch.
            seed: as in `batch`.
            epoch: as in `batch`.
            workers: processes or threads that decode; 0: this one does.
            side: as in `batch`.
        """
        for indices in rows:
            yield self.batch(indices, seed=seed, epoch=epoch, side=side)

    def release(self) -> None:  # noqa: B027  most keep nothing
        """Give back what only the next `stream` would need."""

    def where(self, sample: int) -> str:
        """Where a sample comes from, for messages."""
        return f"sample {sample}"

    def describe(self) -> dict[str, Any]:
        """What the pixels of a batch depend on beside samples and seed, as JSON data."""
        return {"loader": "device"}

    @property
    def num_forms(self) -> int | None:
        """How many forms an image may come in, if `Batch.places` tells them apart; else None."""
        return None

    def content(self) -> str:
        """SHA-256 of all images; for a split whose number of forms is known."""
        raise NotImplementedError


def num_forms(crop_padding: int, flip: bool) -> int:
    """In how many forms random crop and flip give an image."""
    return (2 * crop_padding + 1) ** 2 * (2 if flip else 1)


class Augmentation:
    """Random crop and flip of one training split.

    Drawn for all samples at once when the epoch changes: a hash is some 15 small kernels, too many
    launches for every step.
    """

    def __init__(self, num_samples: int, crop_padding: int, flip: bool, device: torch.device):
        self.ids = torch.arange(num_samples, device=device)
        self.crop_padding, self.flip = crop_padding, flip
        self.num_forms = num_forms(crop_padding, flip)
        # seed -> epoch, offsets [N, 2], flips [N]: runs of several seeds take turns
        self._drawn: dict[int, tuple[int, Tensor | None, Tensor | None]] = {}

    def __call__(
        self, indices: Tensor, seed: int, epoch: int
    ) -> tuple[tuple[int, Tensor] | None, Tensor | None]:
        """`Batch.crop` and `Batch.flip` of the samples `indices` (int64 [B])."""
        if seed not in self._drawn or self._drawn[seed][0] != epoch:
            padding = self.crop_padding
            self._drawn[seed] = (
                epoch,
                crop_offsets(seed, epoch, self.ids, padding) if padding else None,
                flips(seed, epoch, self.ids) if self.flip else None,
            )
        _, offsets, flipped = self._drawn[seed]
        crop = None if offsets is None else (self.crop_padding, offsets[indices])
        return crop, None if flipped is None else flipped[indices]


class ResidentSplit(Split):
    """A split that lies in the device's memory as a whole."""

    def __init__(self, images: Tensor, labels: Tensor, augmentation: Augmentation | None):
        self.images = images  # uint8 [N, H, W, 3]
        self.labels = labels
        self.augmentation = augmentation

    def batch(self, indices: Tensor, *, seed: int, epoch: int, side: int | None = None) -> Batch:
        """See `Split.batch`; the images are as large as they lie there."""
        indices = indices.to(self.labels.device, non_blocking=True)
        crop, flip = self.augmentation(indices, seed, epoch) if self.augmentation else (None, None)
        # whole images at once: indexing by a tensor goes byte by byte on a CPU, 40 times slower
        images = self.images.index_select(0, indices)
        return Batch(images, self.labels[indices], crop, flip, indices)

    @property
    def num_forms(self) -> int:
        """See `Split.num_forms`."""
        return 1 if self.augmentation is None else self.augmentation.num_forms

    def content(self) -> str:
        """See `Split.content`."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in self.images.split(_HASHED_IMAGES):
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DataIdentity:
    """Who a data set is, by what its classes and images are, before any limit.

    Equal wherever it lies, under whatever name, in whatever order, by whatever loader. Each part is
    a SHA-256: two data sets may have the classes or a split in common.
    """

    classes: str
    """SHA-256 of the class names in the order of their numbers."""
    train: str
    """SHA-256 of the labels and images of the training split."""
    test: str
    """SHA-256 of the labels and images of the test split."""


def digest_of_names(names: Iterable[str]) -> str:
    """SHA-256 of names in their order."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def digest_of_arrays(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the images of a split with their labels, in whatever order they come.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
    """
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    pairs = zip(labels.tolist(), rows, strict=True)
    found = sorted(b"%08d%b" % (label, hashlib.sha256(row).digest()) for label, row in pairs)
    return hashlib.sha256(repr(images.shape[1:]).encode() + b"".join(found)).hexdigest()


@dataclass(frozen=True)
class ImageData:
    """A data set: both splits and what a model must know about them."""

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: list[str]
    image_size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    """Mean of each channel, pixels in 0..1."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, pixels in 0..1."""
    pipeline: dict[str, Any] = field(default_factory=dict)
    """What samples and pixels depend on: the same in a run that goes on."""
    notes: list[str] = field(default_factory=list)
    """What a user must be told of the data, one line each."""
    passed_over: list[str] = field(default_factory=list)
    """Files among the data that are not read, counted, a line a kind."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How the images are cut, as JSON data; "in_words" says it to a user."""
    skipped_test: int = 0
    """Test images that are left out, as they are in quarantine."""
    identity: DataIdentity | None = None
    """Who the data set is; None: images that were made up for a measurement."""


@dataclass(frozen=True)
class RawSplit:
    """The arrays of one split, as read."""

    images: np.ndarray
    """uint8 [N, H, W, 3]."""
    labels: np.ndarray
    """int64 [N]."""


def resident_data(
    config: DataConfig,
    device: torch.device,
    train: RawSplit,
    test: RawSplit,
    *,
    class_names: list[str],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    default_padding: int,
) -> ImageData:
    """An `ImageData` whose images, cut to the configured limits, lie on `device`."""
    train_limit, test_limit = split_limits(config)

    def resident(raw: RawSplit, limit: int | None) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(raw.labels)
        chosen = spread_over_classes(labels, limit)
        images = torch.from_numpy(raw.images)[chosen]
        return images.to(device), labels[chosen].to(device)

    train_images, train_labels = resident(train, train_limit)
    padding = default_padding if config.crop_padding is None else config.crop_padding
    augmentation = Augmentation(len(train_labels), padding, config.flip, device)
    height, width = train.images.shape[1:3]
    rule = crop_rule("small", height, padding)
    return ImageData(
        name=config.name,
        train=ResidentSplit(train_images, train_labels, augmentation),
        test=ResidentSplit(*resident(test, test_limit), augmentation=None),
        num_classes=len(class_names),
        class_names=class_names,
        image_size=(height, width),
        mean=mean,
        std=std,
        pipeline={"loader": "device"},
        preprocessing={
            "layout": config.name,
            **rule.describe(height, config.flip),
            "in_words": f"images of {config.name}: {rule.in_words(height, config.flip)}",
        },
        identity=DataIdentity(
            digest_of_names(class_names),
            digest_of_arrays(train.images, train.labels),
            digest_of_arrays(test.images, test.labels),
        ),
    )


def split_limits(config: DataConfig) -> tuple[int | None, int | None]:
    """Most images of the training and of the test split."""
    limits = [limit for limit in (config.limit, config.train_limit) if limit is not None]
    return min(limits, default=None), config.limit


def spread_over_classes(labels: Tensor, limit: int | None) -> Tensor:
    """Which samples a limited split keeps: the first of every class, then the second of every one.

    Only the order within a class matters: archives that interleave the classes differently give
    the same images.

    Args:
        labels: int64 [N].
        limit: most samples to keep; None or N and more: all of them.

    Returns:
        int64 [min(N, limit)], sample numbers: round robin over the classes if cut, else 0..N-1.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = torch.cumsum(counts, 0) - counts
    rank_in_class = torch.arange(len(labels)) - starts[labels[by_class]]
    return by_class[torch.argsort(rank_in_class, stable=True)][:limit]


def find_root(root: str | None, looked_for: str) -> Path:
    """The data folder: `--data.root`, else the environment variable DFPTKD_DATA.

    Args:
        root: the configured folder.
        looked_for: what the folder should hold, for the message.

    Raises:
        DataError: neither is set, or the folder does not exist.
    """
    origin = "--data.root" if root else "DFPTKD_DATA"
    root = root or os.environ.get("DFPTKD_DATA")
    if not root:
        raise DataError(
            "no data folder: set --data.root or the environment variable DFPTKD_DATA to a folder "
            f"that holds {looked_for}"
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"{origin} {path}: no such folder, expected one that holds {looked_for}")
    return path


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def check_labels(labels: np.ndarray, num_classes: int, where: object) -> np.ndarray:
    """`labels` as int64 [N].

    Raises:
        DataError: a label lies outside 0..num_classes-1.
    """
    labels = labels.astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{where}: label {labels[wrong[0]]} in record {wrong[0]}, expected 0..{num_classes - 1}"
        )
    return labels
