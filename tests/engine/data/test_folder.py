"""Image folders: ImageNet's crops, decoding in workers, refusals (M25; faults 10, 19, 20)."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import load_data, test_batches, train_batches
from dfptkd.engine.data.crops import RandomResizedCrop
from dfptkd.engine.errors import DataError

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def root(tmp_path):
    """4 training and 3 test JPEGs a class, of odd sizes and modes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                size = tuple(int(s) for s in rng.integers(20, 60, 2))
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[i % 3])
                image.save(tmp_path / split / name / f"{i}.JPEG")
            (tmp_path / split / name / "notes.txt").write_text("no image")
    return tmp_path


def load(root, **options):
    options = {"loader": "torchvision", "image_size": 24, **options}
    return load_data(DataConfig(name="folder", root=str(root), **options), CPU)


def random_box(seed, epoch, sample, height, width):
    """Top, left, height, width of one training crop."""
    size = torch.tensor([[height, width]])
    box = RandomResizedCrop().boxes(torch.tensor([sample]), size, seed=seed, epoch=epoch, side=224)
    return tuple(int(v) for v in box[0])


def epoch_of(split, **options):
    return list(train_batches(split, batch_size=5, seed=1, epoch=2, **options))


def same(a, b):
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "flip", "indices")
    )


def test_folder_batch_M25(root):
    data = load(root)
    assert data.class_names == list(CLASSES)
    assert (len(data.train), len(data.test), data.image_size) == (12, 9, (24, 24))
    batch = data.train.batch(torch.tensor([11, 0, 5]), seed=0, epoch=0)
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (3, 24, 24, 3))
    assert (batch.labels.dtype, batch.labels.tolist()) == (torch.int64, [2, 0, 1])
    assert batch.crop is None
    assert (batch.flip.dtype, batch.flip.shape) == (torch.bool, (3,))
    assert data.test.batch(torch.tensor([0]), seed=0, epoch=0).flip is None
    assert load(root, flip=False).train.batch(torch.tensor([0]), seed=0, epoch=0).flip is None


def test_training_crop_is_torchvisions_on_our_box_M25(root):
    data = load(root)
    image = Image.open(root / "train" / "bee" / "1.JPEG").convert("RGB")
    box = random_box(3, 4, 5, image.height, image.width)
    expected = v2.functional.resized_crop(image, *box, [24, 24], antialias=True)
    batch = data.train.batch(torch.tensor([5]), seed=3, epoch=4)
    assert np.array_equal(batch.images[0].numpy(), np.asarray(expected))


def test_evaluation_crop_is_torchvisions_M25(root):
    transform = v2.Compose([v2.Resize(round(24 * 256 / 224), antialias=True), v2.CenterCrop(24)])
    paths = sorted((root / "val").glob("*/*.JPEG"))
    expected = np.stack([np.asarray(transform(Image.open(p).convert("RGB"))) for p in paths])
    batches = list(test_batches(load(root).test, batch_size=4))
    assert [len(b.labels) for b in batches] == [4, 4, 1]
    found = torch.cat([b.images for b in batches]).numpy()
    # We cut the box out of the source: what is half a level exactly may be rounded the other way.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 0.15


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 100), (30, 400)])
def test_random_boxes_are_distributed_like_torchvisions_M25(height, width):
    n = 1500
    sizes = torch.tensor([[height, width]]).expand(n, 2)
    ours = RandomResizedCrop().boxes(torch.arange(n), sizes, seed=0, epoch=0, side=224)
    crop = v2.RandomResizedCrop(224)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [crop.make_params([image]) for _ in range(n)]
    theirs = [(p["top"], p["left"], p["height"], p["width"]) for p in theirs]

    def statistics(boxes):
        top, left, h, w = torch.as_tensor(boxes).double().unbind(1)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + h <= height).all()
        assert (left + w <= width).all()
        values = torch.stack([top, left, h, w, h * w / height / width, (w / h).log()])
        return values.mean(1), values.std(1)

    (mean, std), (their_mean, their_std) = statistics(ours), statistics(theirs)
    # five standard errors of a difference of two means; 10 % of a spread
    assert ((mean - their_mean).abs() <= 5 * their_std * math.sqrt(2 / n) + 1e-9).all()
    assert ((std - their_std).abs() <= 0.1 * their_std + 1e-9).all()


def test_random_box_is_frozen():
    boxes = [random_box(0, 0, i, 375, 500) for i in range(3)]
    assert boxes == [(37, 110, 299, 377), (69, 102, 241, 244), (74, 133, 250, 330)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_bit_equal_for_any_number_of_workers(root, workers):
    split = load(root).train
    expected = epoch_of(split)
    generator_state = torch.get_rng_state()
    found = epoch_of(split, workers=workers)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert len(found) == len(expected) == 2
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    resumed = epoch_of(split, workers=workers, start_step=1)
    assert len(resumed) == 1
    assert same(resumed[0], expected[1])


def test_stateful_crops_fail_the_comparison(root, monkeypatch):
    # negative control: crops from a generator with a state are not a function of the sample
    def stateful_boxes(self, samples, sizes, **_):
        height, width = sizes[0].tolist()
        box = [random.randrange(height // 2), random.randrange(width // 2), height // 2, width // 2]
        return torch.tensor([box]).double()

    split = load(root).train
    monkeypatch.setattr(RandomResizedCrop, "boxes", stateful_boxes)
    assert not all(same(a, b) for a, b in zip(epoch_of(split), epoch_of(split), strict=True))


def test_epochs_crop_differently(root):
    split = load(root).train
    a, b = (split.batch(torch.arange(12), seed=0, epoch=e) for e in (0, 1))
    assert not any(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_limits_are_balanced(root):
    data = load(root, limit=6, train_limit=5)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    batch = data.train.batch(torch.tensor([4]), seed=0, epoch=0)
    assert (batch.labels.item(), batch.indices.item()) == (1, 4)
    assert data.train.files.name(4) == "train/bee/1.JPEG"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "vanished"])
def test_undecodable_image_is_named(root, damage, workers):
    path = root / "val" / "cat" / "1.JPEG"
    data = load(root)
    raw = path.read_bytes()
    if damage == "vanished":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": raw[: len(raw) // 2], "empty": b"", "text": b"hello"}[damage]
        )
    with pytest.raises(DataError) as info:
        list(test_batches(data.test, batch_size=4, workers=workers))
    said = "cannot be read" if damage == "vanished" else "cannot be decoded as an image"
    assert str(info.value).startswith(f"{path}: {said}")
    assert "\n" not in str(info.value)


def test_refusals_name_the_folder(root):
    def refusal():
        with pytest.raises(DataError) as info:
            load(root)
        assert "\n" not in str(info.value)
        return str(info.value)

    for file in (root / "val" / "bee").iterdir():
        file.unlink()
    assert refusal().startswith(f"{root / 'val' / 'bee'}: no image")
    (root / "val" / "bee").rmdir()
    assert "lacks 1 class that train/ has, first 'bee'" in refusal()
    assert str(root / "val") in refusal()
    shutil.rmtree(root / "val")
    assert "neither val/ nor test/" in refusal()
    (root / "test").mkdir()
    assert refusal().startswith(f"{root / 'test'}: found 0 class folders")
    shutil.rmtree(root / "test")
    (root / "train").rename(root / "val")
    assert "found no folder train/, expected train/<class>/<image>" in refusal()


def test_single_level_of_folders_is_refused(root):
    with pytest.raises(DataError, match=r"expected train/<class>/<image> and val/<class>/<image>"):
        load(root / "train")


def test_photographs_M25(shared_data, tmp_path):
    photographs = sorted((shared_data / "jpeg-sample").iterdir())[:6]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for source in photographs:
            (tmp_path / split / source.name).symlink_to(source)
    data = load(tmp_path, image_size=64)
    batch = next(train_batches(data.train, batch_size=6, seed=0, epoch=0, workers=2))
    assert batch.images.shape == (6, 64, 64, 3)
    assert sorted(batch.labels.tolist()) == list(range(6))
    # photographs, normalised with ImageNet's constants, are roughly centred
    pixels = batch.images.double() / 255
    assert ((pixels.mean((0, 1, 2)) - torch.tensor(data.mean)).abs() < 0.2).all()
