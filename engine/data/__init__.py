"""Data sources: raw uint8 batches whose order and augmentation are a pure function of the seed."""

from .file_data import SOURCES
from .loader import (
    epoch_rows,
    load_data,
    num_replaced,
    steps_per_epoch,
    test_batches,
    train_batches,
)
from .source import Batch, DataIdentity, ImageData, Split

__all__ = [
    "SOURCES",
    "Batch",
    "DataIdentity",
    "ImageData",
    "Split",
    "epoch_rows",
    "load_data",
    "num_replaced",
    "steps_per_epoch",
    "test_batches",
    "train_batches",
]
