"""Data sources: raw uint8 batches whose order and augmentation are a pure function of the seed."""

from .loader import load_data, num_replaced, steps_per_epoch, test_batches, train_batches
from .source import Batch, ImageData, Split

__all__ = [
    "Batch",
    "ImageData",
    "Split",
    "load_data",
    "num_replaced",
    "steps_per_epoch",
    "test_batches",
    "train_batches",
]
