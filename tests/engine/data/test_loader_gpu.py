"""Decoded batches arrive on a GPU whole, in order, each copied while the last is worked on.

Run by bench/on_gpu.sh; needs neither tyro nor a network.
"""

import pytest
import torch

from dfptkd.engine.data.source import Batch
from dfptkd.engine.data.torchvision_loader import on_device
from dfptkd.engine.errors import DataError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(i):
    images = torch.full((32, 224, 224, 3), i % 251, dtype=torch.uint8)
    offsets, flip = torch.full((32, 2), i), torch.arange(32) % 2 == i % 2
    made = Batch(images, torch.full((32,), i), (4, offsets), flip, torch.arange(32) + i)
    return made.pin_memory()


def test_every_batch_arrives_whole_and_in_order():
    work = torch.randn(4096, 4096, device="cuda")
    seen = []
    for i, found in enumerate(on_device((batch(i) for i in range(20)), torch.device("cuda"))):
        work = (work @ work).clamp(-1, 1)  # the copies run beside it
        seen.append((found.labels == i).all() & (found.images == i % 251).all())
        assert found.crop[1].device.type == "cuda"
    assert len(seen) == 20
    assert torch.stack(seen).all()


def test_an_error_comes_after_the_batches_before_it_or_at_once():
    found = on_device([batch(0), batch(1), DataError("broken")], torch.device("cuda"))
    assert next(found).labels[0] == 0
    with pytest.raises(DataError, match="broken"):
        next(found)
