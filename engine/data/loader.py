"""From a configuration to batches: opens a data set and walks an epoch, or its rank's share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UsageError
from .cifar import load_cifar
from .fashion_mnist import load_fashion_mnist
from .file_data import SOURCES, load_files
from .order import epoch_order
from .quarantine import replace_listed
from .source import Batch, ImageData, Split
from .synthetic import load_synthetic

_LOAD = {
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "fashion_mnist": load_fashion_mnist,
    "synthetic": load_synthetic,
    **dict.fromkeys(SOURCES, load_files),
}
Shard = tuple[int, int]
"""(rank, number of ranks)"""


def load_data(config: DataConfig, device: torch.device) -> ImageData:
    """The configured data set; batches come on `device`, small sets lie there as a whole.

    Raises:
        DataError: the data is missing or breaks its format.
        UsageError: options that the data set does not take.
    """
    if config.name not in SOURCES:
        own = "synthetic" if config.name == "synthetic" else "device"
        if config.loader not in ("auto", own):
            raise UsageError(
                f"data.loader={config.loader!r} with data.name={config.name!r}: expected auto or "
                f"{own}"
            )
        for name in ("mean", "std"):
            if getattr(config, name) is not None:
                raise UsageError(
                    f"data.{name} with data.name={config.name!r}: expected image files; the others "
                    "have their own (a teacher's: --teacher.mean, --teacher.std)"
                )
        if config.crops != "auto":
            raise UsageError(
                f"data.crops={config.crops!r} with data.name={config.name!r}: expected image "
                "files; the others have their own"
            )
        if config.start_size is not None and config.name != "synthetic":
            raise UsageError(
                f"data.start_size={config.start_size} with data.name={config.name!r}: expected "
                "image files, which can be decoded to any size"
            )
    return _LOAD[config.name](config, device)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Full batches in an epoch; a split smaller than a batch is one step of all its samples."""
    return max(num_samples // batch_size, 1)


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    workers: int = 0,
    shard: Shard = (0, 1),
    side: int | None = None,
) -> Iterator[Batch]:
    """An epoch's batches in random order, the last partial one dropped.

    The batch of a step is a pure function of (seed, epoch, step): a resumed epoch starts at
    `start_step` without replay. An image in quarantine is replaced here, before anything is
    decoded, and so alike by every loader.

    Args:
        split: a training split.
        batch_size: images of a batch, of all ranks together.
        seed: seed of the run.
        epoch: epoch from 0.
        start_step: first step to yield.
        workers: decoding processes or threads; 0 decodes in this one. Splits in memory need none.
        shard: which part of each batch to yield: the rows of one rank.
        side: of the images, in pixels, where the split makes them to measure; None: its own.
    """
    rows = epoch_rows(split, batch_size=batch_size, seed=seed, epoch=epoch, shard=shard)
    yield from split.stream(rows[start_step:], seed=seed, epoch=epoch, workers=workers, side=side)


def epoch_rows(
    split: Split, *, batch_size: int, seed: int, epoch: int, shard: Shard = (0, 1)
) -> list[Tensor]:
    """The sample numbers of each batch of an epoch, int64; arguments as of `train_batches`."""
    order = epoch_order(seed, epoch, len(split), split.labels.device)
    if split.listed is not None:
        order = replace_listed(
            order.cpu(), split.listed, split.labels.cpu(), seed=seed, epoch=epoch
        ).to(split.labels.device)
    rank, ranks = shard
    batches = order.split(batch_size)[: steps_per_epoch(len(split), batch_size)]
    return [batch.tensor_split(ranks)[rank] for batch in batches]


def num_replaced(
    split: Split, *, batch_size: int, seed: int, epoch: int, start: int, stop: int
) -> int:
    """Images of the steps `start` to `stop` of an epoch that stand in for one in quarantine."""
    if split.listed is None:
        return 0
    order = epoch_order(seed, epoch, len(split))
    return int(split.listed[order[start * batch_size : stop * batch_size]].sum())


def test_batches(
    split: Split,
    *,
    batch_size: int,
    workers: int = 0,  # noqa: PT028 (public name, not a test)
    shard: Shard = (0, 1),  # noqa: PT028
) -> Iterator[Batch]:
    """Every image exactly once, in order; the last batch may be partial.

    Args:
        split: a test split (a training split would come augmented as in epoch 0 of seed 0).
        batch_size: images of a batch.
        workers: as in `train_batches`.
        shard: which of equal blocks (but for one image) of the split to yield.
    """
    rank, ranks = shard
    samples = torch.arange(len(split), device=split.labels.device)
    own = samples.tensor_split(ranks)[rank]
    rows = own.split(batch_size) if len(own) else ()
    yield from split.stream(rows, seed=0, epoch=0, workers=workers)


# pytest would take the public name for a test wherever it is imported
test_batches.__test__ = False  # type: ignore[attr-defined]
