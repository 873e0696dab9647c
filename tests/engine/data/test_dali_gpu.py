"""DALI on a GPU: pictures, order, failures, batches in flight.

Run by bench/on_gpu.sh; needs neither tyro nor a network.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dfptkd.engine.data.crops import CenterCrop, RandomResizedCrop, StretchedCrop
from dfptkd.engine.data.dali import DaliSplit
from dfptkd.engine.data.image_files import FolderFiles
from dfptkd.engine.data.torchvision_loader import TorchvisionSplit
from dfptkd.engine.errors import DataError

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("nvidia.dali", reason="DALI is not installed")

CUDA = torch.device("cuda")
SIDE, COUNT = 96, 40


@pytest.fixture
def files(tmp_path):
    """Smooth pictures of every kind that the decoders tell apart."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        image = coarse.resize((90 + 7 * i, 240 - 3 * i), Image.Resampling.BICUBIC)
        mode = ("RGB", "RGB", "L", "CMYK")[i % 4]
        image.convert(mode).save(tmp_path / f"{i}.jpg", quality=92, progressive=i % 3 == 0)
    names = np.array([f"{i}.jpg".encode() for i in range(COUNT)])
    return FolderFiles(tmp_path, names, torch.arange(COUNT) % 5)


def make(files, crops, cls=DaliSplit):
    return cls(files, crops, SIDE, CUDA, flip=True)


def rows_of(size):
    return torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).split(size)


def streamed(split, rows):
    return list(split.stream(rows, seed=3, epoch=1, workers=4))


@pytest.mark.parametrize("crops", [RandomResizedCrop(), StretchedCrop(random=True), CenterCrop()])
def test_pictures_are_pillows(files, crops):
    ours = make(files, crops).batch(torch.arange(COUNT), seed=0, epoch=0)
    theirs = make(files, crops, TorchvisionSplit).batch(torch.arange(COUNT), seed=0, epoch=0)
    assert ours.images.device.type == ours.labels.device.type == ours.flip.device.type == "cuda"
    assert torch.equal(ours.flip, theirs.flip)
    difference = (ours.images.int() - theirs.images.int()).abs().float().mean((1, 2, 3))
    print(f"\n{crops}: mean {difference.mean():.3f}, worst image {difference.max():.3f} of 255")
    assert difference.max() < 2


def test_batches_stay_as_they_are_and_come_in_order(files):
    split, kept, sums = make(files, RandomResizedCrop()), [], []
    for _ in range(5):
        for batch in split.stream(rows_of(7), seed=3, epoch=1, workers=4):
            kept.append(batch)
            sums.append(batch.images.long().sum())
    assert [b.indices.tolist() for b in kept] == [r.tolist() for r in rows_of(7)] * 5
    assert [b.images.long().sum() for b in kept] == sums
    for step, batch in enumerate(kept):
        assert torch.equal(batch.images, kept[step % 6].images)


def test_a_resumed_epoch_is_the_rest_of_a_whole_one(files):
    whole = streamed(make(files, RandomResizedCrop()), rows_of(7))
    split = make(files, RandomResizedCrop())
    stream = split.stream(rows_of(7), seed=0, epoch=0, workers=4)
    next(stream)
    stream.close()
    rest = streamed(split, rows_of(7)[2:])
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))


def test_a_stream_of_ones_own_sees_finished_images(files):
    expected = streamed(make(files, RandomResizedCrop()), rows_of(7))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = [b.images + 0 for b in streamed(make(files, RandomResizedCrop()), rows_of(7))]
    torch.cuda.synchronize()
    assert all(torch.equal(a.images, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_undecodable_image_is_named(files, damage):
    path = files.root / "7.jpg"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if damage == "truncated" else b"hello")
    split = make(files, RandomResizedCrop())
    with pytest.raises(DataError, match=f"^{path}: cannot be decoded"):
        streamed(split, rows_of(7))
    path.write_bytes(raw)
    assert len(streamed(split, rows_of(7))) == 6


def test_a_broken_scan_does_not_end_the_process(files):
    """Pillow makes a picture of it; a GPU's decoder may refuse, and Pillow then steps in."""
    path = files.root / "5.jpg"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : -2] = bytes(len(raw) - len(raw) // 2 - 2)
    path.write_bytes(bytes(raw))
    named = ""
    try:
        batches = streamed(make(files, RandomResizedCrop()), rows_of(7))
    except DataError as error:
        named = str(error)
    assert str(path) in named or len(batches) == 6
