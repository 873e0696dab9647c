"""Walking an epoch, limits, synthetic data (M15: the order is the run's, not the loader's)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import load_data, steps_per_epoch, test_batches, train_batches
from dfptkd.engine.data.source import RawSplit, resident_data, spread_over_classes

CPU = torch.device("cpu")


def resident(n=23, classes=3, **options):
    """A small data set in memory; image i holds the value i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3)).copy()
    raw = RawSplit(images, np.arange(n, dtype=np.int64) % classes)
    return resident_data(
        DataConfig(name="cifar10", **options),
        CPU,
        raw,
        raw,
        class_names=[str(i) for i in range(classes)],
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        default_padding=4,
    )


def test_epoch_visits_each_image_at_most_once_and_drops_the_rest():
    split = resident().train
    batches = list(train_batches(split, batch_size=5, seed=0, epoch=0))
    assert len(batches) == steps_per_epoch(23, 5) == 4
    seen = torch.cat([b.indices for b in batches])
    assert len(seen.unique()) == len(seen) == 20
    assert seen.tolist() != sorted(seen.tolist())
    for batch in batches:
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
        assert torch.equal(batch.labels, batch.indices % 3)


def test_dropped_images_change_from_epoch_to_epoch():
    split = resident().train
    seen = [
        {
            i
            for b in train_batches(split, batch_size=20, seed=0, epoch=e)
            for i in b.indices.tolist()
        }
        for e in range(8)
    ]
    assert set.union(*seen) == set(range(23))


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 5), batch_size=st.integers(1, 30), epoch=st.integers(0, 3))
def test_resumed_epoch_equals_the_rest_of_a_whole_one(start, batch_size, epoch):
    options = {"batch_size": batch_size, "seed": 3, "epoch": epoch}
    whole = list(train_batches(resident().train, **options))
    split = resident().train
    # an augmentation of another epoch was drawn before
    next(train_batches(split, **{**options, "epoch": epoch + 1}))
    rest = list(train_batches(split, **options, start_step=start))
    assert len(rest) == max(len(whole) - start, 0)
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.crop[1], b.crop[1])
        assert torch.equal(a.flip, b.flip)


def test_batches_larger_than_the_split():
    assert steps_per_epoch(23, 64) == 1
    (batch,) = train_batches(resident().train, batch_size=64, seed=0, epoch=0)
    assert sorted(batch.indices.tolist()) == list(range(23))


def test_evaluation_sees_each_image_once_in_order():
    batches = list(test_batches(resident().test, batch_size=10))
    assert [len(b.labels) for b in batches] == [10, 10, 3]
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(23))
    assert all(b.crop is None and b.flip is None for b in batches)


def test_crop_and_flip_follow_the_configuration():
    indices = torch.arange(23)
    batch = resident(crop_padding=0, flip=False).train.batch(indices, seed=0, epoch=0)
    assert batch.crop is None
    assert batch.flip is None
    padding, offsets = resident(crop_padding=2).train.batch(indices, seed=0, epoch=0).crop
    assert padding == 2
    assert offsets.max() == 4
    assert resident().train.batch(indices, seed=0, epoch=0).crop[0] == 4


def test_limits():
    data = resident(limit=9, train_limit=6)
    assert (len(data.train), len(data.test)) == (6, 9)
    assert torch.bincount(data.train.labels).tolist() == [2, 2, 2]
    data = resident(limit=4, train_limit=6)
    assert (len(data.train), len(data.test)) == (4, 4)
    data = resident(limit=1000)
    assert torch.equal(data.train.labels, torch.arange(23) % 3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60), st.randoms())
def test_limit_takes_evenly_and_ignores_how_classes_interleave(labels, limit, rng):
    labels = torch.tensor(labels)
    chosen = spread_over_classes(labels, limit)
    assert len(chosen.unique()) == len(chosen) == min(limit, len(labels))
    counts, available = (
        torch.bincount(labels[chosen], minlength=5),
        torch.bincount(labels, minlength=5),
    )
    # a class is short of the fullest one by more than 1 only if it has no more images
    assert ((counts >= counts.max() - 1) | (counts == available)).all()
    if limit < len(labels):
        by_class = torch.argsort(labels, stable=True)  # the same images, one class after the other
        again = by_class[spread_over_classes(labels[by_class], limit)]
        assert torch.equal(chosen, again)


def synthetic(**options):
    options = {"image_size": 20, "num_classes": 10, **options}
    return load_data(DataConfig(name="synthetic", **options), CPU)


def test_synthetic_images_are_a_function_of_their_number():
    data = synthetic(limit=500)
    assert (len(data.train), len(data.test), data.num_classes) == (500, 500, 10)
    a = data.train.batch(torch.tensor([7, 3]), seed=0, epoch=0)
    b = synthetic(limit=500).train.batch(torch.tensor([3, 8, 7]), seed=5, epoch=6)
    assert (a.images.dtype, a.images.shape) == (torch.uint8, (2, 20, 20, 3))
    assert torch.equal(a.images[0], b.images[2])
    assert not torch.equal(b.images[0], b.images[1])
    assert not torch.equal(a.images, data.test.batch(torch.tensor([7, 3]), seed=0, epoch=0).images)
    assert a.crop is None
    assert synthetic(crop_padding=4).train.batch(torch.tensor([0]), seed=0, epoch=0).crop[0] == 4


def test_synthetic_labels_can_be_learnt_and_statistics_fit():
    data = synthetic(limit=400)
    train, test = (
        split.batch(torch.arange(400), seed=0, epoch=0) for split in (data.train, data.test)
    )
    pixels = train.images.double() / 255
    assert (pixels.mean() - data.mean[0]).abs() < 0.05
    assert (pixels.std() - data.std[0]).abs() < 0.05
    colours = torch.stack([pixels[train.labels == c].mean((0, 1, 2)) for c in range(10)])
    found = torch.cdist((test.images.double() / 255).mean((1, 2)), colours).argmin(1)
    assert (found == test.labels).double().mean() > 0.9


def test_synthetic_sizes_follow_the_configuration():
    data = synthetic(
        image_size=7, num_classes=3
    )  # 147 bytes an image: not a multiple of a hash's 8
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.train.batch(torch.arange(2), seed=0, epoch=0).images.shape == (2, 7, 7, 3)
    assert torch.bincount(data.train.labels).min() > 16_000


def test_batch_moves_as_a_whole():
    batch = resident().train.batch(torch.arange(4), seed=0, epoch=0)
    moved = batch.to(torch.device("meta"))
    for field in dataclasses.fields(moved):
        value = getattr(moved, field.name)
        value = value[1] if field.name == "crop" else value
        assert value.device.type == "meta"


@pytest.mark.parametrize("workers", [0, 3])
def test_resident_data_ignores_workers(workers):
    batches = train_batches(resident().train, batch_size=5, seed=0, epoch=0, workers=workers)
    assert next(batches).images.shape == (5, 8, 8, 3)
