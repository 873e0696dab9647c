"""From a configuration to batches: opens a data set, walks an epoch, decodes in parallel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig
from ..errors import DataError
from .cifar import load_cifar
from .fashion_mnist import load_fashion_mnist
from .folder import load_folder
from .order import epoch_order
from .source import Batch, DecodingSplit, ImageData, Split
from .synthetic import load_synthetic

_SOURCES = {
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "fashion_mnist": load_fashion_mnist,
    "folder": load_folder,
    "synthetic": load_synthetic,
}


def load_data(config: DataConfig, device: torch.device) -> ImageData:
    """The configured data set; batches come on `device`, small sets lie there as a whole.

    Raises:
        DataError: the data is missing or breaks its format.
    """
    return _SOURCES[config.name](config, device)


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
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """An epoch's batches in random order, the last partial one dropped.

    The batch of a step is a pure function of (seed, epoch, step): a resumed epoch starts at
    `start_step` without replay.

    Args:
        split: a training split.
        batch_size: images of a batch, over all shards.
        seed: seed of the run.
        epoch: epoch from 0.
        start_step: first step to yield.
        workers: decoding processes; 0 decodes in this one. Splits in memory need none.
        shard: (r, w): of each batch the r-th of w equal parts.
    """
    order = epoch_order(seed, epoch, len(split), split.labels.device)
    steps = steps_per_epoch(len(split), batch_size)
    rank, size = shard
    rows = [
        batch[rank * len(batch) // size : (rank + 1) * len(batch) // size]
        for batch in order.split(batch_size)[start_step:steps]
    ]
    yield from _batches(split, rows, seed, epoch, workers)


def test_batches(
    split: Split,
    *,
    batch_size: int,
    workers: int = 0,  # noqa: PT028 (public name, not a test)
    shard: tuple[int, int] = (0, 1),  # noqa: PT028
) -> Iterator[Batch]:
    """Every image exactly once, in order; the last batch may be partial.

    Args:
        split: a test split (a training split would come augmented as in epoch 0 of seed 0).
        batch_size: images of a batch.
        workers: as in `train_batches`.
        shard: (r, w): the r-th of the w blocks of `torch.tensor_split`, which differ by one image
            at most.
    """
    rank, size = shard
    order = torch.arange(len(split), device=split.labels.device).tensor_split(size)[rank]
    yield from _batches(split, order.split(batch_size), seed=0, epoch=0, workers=workers)


# pytest would take the public name for a test wherever it is imported
test_batches.__test__ = False  # type: ignore[attr-defined]


def _batches(
    split: Split, rows: Sequence[Tensor], seed: int, epoch: int, workers: int
) -> Iterator[Batch]:
    if not (isinstance(split, DecodingSplit) and workers):
        for indices in rows:
            yield split.batch(indices, seed=seed, epoch=epoch)
        return
    loader = DataLoader(
        _DecodedBatches(split, rows, seed, epoch),
        batch_size=None,
        num_workers=workers,
        pin_memory=split.device.type == "cuda",
        # its own generator: the loader would else advance the global one, which checkpoints record
        generator=torch.Generator(),
    )
    yield from _on_device(loader, split.device)


def _on_device(batches: Iterable[Batch | DataError], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`; a GPU's copy of the next one runs while the last one is worked on."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: Batch | None = None
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        if stream is None:
            yield batch.to(device)
            continue
        with torch.cuda.stream(stream):
            moved = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(stream)
        moved.record_stream(torch.cuda.current_stream(device))
        ahead = moved
    if ahead is not None:
        yield ahead


class _DecodedBatches(Dataset):
    """Batch number -> decoded batch, in a worker process."""

    def __init__(self, split: DecodingSplit, rows: Sequence[Tensor], seed: int, epoch: int):
        self.split, self.rows, self.seed, self.epoch = split, rows, seed, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self.split.decode(self.rows[step], seed=self.seed, epoch=self.epoch)
        except DataError as error:
            # as a value: the loader would bury a raised error's one line in a traceback
            return error
