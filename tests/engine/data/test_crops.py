"""How images are cut follows from the images, is the same for every loader, and is said."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import encoded, write_folder
from torchvision.transforms import v2

from dfptkd.engine import checkpoint, run
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, RunConfig
from dfptkd.engine.data import load_data, test_batches, train_batches
from dfptkd.engine.data.crops import crops_of_record, kind_of_images
from dfptkd.engine.data.facts import data_facts
from dfptkd.engine.errors import DataError, UsageError

CPU = torch.device("cpu")
LOADERS = ["device", "torchvision"]
if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
    LOADERS.append("dali")


def noise(path, size, seed=0):
    """A lossless image of noise: any resizing shows. Size is height, width."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels), "PNG"))


def small_folder(root, size=(32, 32)):
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("ant", "bee")):
            for i in range(3):
                noise(root / split / name / f"{i}.png", size, 100 * s + 10 * c + i)
    return root


def load(root, **options):
    options = {"image_size": 32, "loader": "torchvision", "workers": 0, **options}
    return load_data(DataConfig(name="folder", root=str(root), **options), CPU)


def pixels_of(root, split):
    paths = sorted((root / split).glob("*/*"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def evaluated(data):
    return torch.cat([batch.images for batch in test_batches(data.test, batch_size=4)]).numpy()


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ([(32, 32)] * 40, "small"),
        ([(64, 64)] * 3, "small"),
        ([(96, 96)], "small"),
        ([(97, 97)] * 40, "photographs"),
        ([(40, 60), (46, 55), (43, 57)], "small"),
        ([(32, 32)] * 39 + [(500, 400)], "small"),
        ([(32, 32)] * 30 + [(500, 400)] * 10, "photographs"),
        ([(64, 48), (48, 64)] * 20, "photographs"),
        ([(15, 15), (30, 28), (90, 80)], "photographs"),
        ([(375, 500)] * 40, "photographs"),
        ([], "photographs"),
    ],
)
def test_which_images_are_small(sizes, kind):
    assert kind_of_images(sizes) == kind


@pytest.mark.parametrize("loader", LOADERS)
def test_photographs_are_evaluated_as_torchvision_does(loader, shared_data, tmp_path):
    photographs = sorted((shared_data / "jpeg-sample").iterdir())[:8]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for source in photographs:
            (tmp_path / split / source.name).symlink_to(source)
    transform = v2.Compose([v2.Resize(128, antialias=True), v2.CenterCrop(112)])
    paths = sorted((tmp_path / "val").glob("*/*"))
    expected = np.stack([np.asarray(transform(Image.open(p).convert("RGB"))) for p in paths])
    data = load(tmp_path, loader=loader, image_size=112)
    difference = np.abs(evaluated(data).astype(int) - expected)
    assert difference.max() <= 2  # a box of the source, and a rounding
    assert difference.mean() < 0.2
    stretched = np.stack(
        [np.asarray(Image.open(p).convert("RGB").resize((112, 112), 2)) for p in paths]
    )
    assert np.abs(stretched.astype(int) - expected).mean() > 10  # control
    # training images are cut anew in every epoch, and alike by every loader
    first, second, other = (
        data.train.batch(torch.arange(8), seed=1, epoch=epoch).images.int() for epoch in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert (first - other).abs().float().mean() > 5
    reference = load(tmp_path, image_size=112).train.batch(torch.arange(8), seed=1, epoch=0)
    assert (first - reference.images.int()).abs().float().mean() < 0.2


@pytest.mark.parametrize("loader", [*LOADERS, "auto"])
@pytest.mark.parametrize("size", [32, 64])
def test_small_images_are_taken_as_they_are(loader, size, tmp_path):
    small_folder(tmp_path, (size, size))
    data = load(tmp_path, loader=loader, image_size=size)
    assert np.array_equal(evaluated(data), pixels_of(tmp_path, "val"))
    (batch,) = train_batches(data.train, batch_size=6, seed=3, epoch=2)
    assert np.array_equal(batch.images.numpy(), pixels_of(tmp_path, "train")[batch.indices])
    assert batch.crop[0] == size // 8
    assert batch.crop[1].min() >= 0
    assert batch.crop[1].max() <= size // 4
    # bit by bit what images on the device get
    (reference,) = train_batches(
        load(tmp_path, loader="device", image_size=size).train, batch_size=6, seed=3, epoch=2
    )
    for ours, theirs in zip(batch.tensors(), reference.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert load(tmp_path, crop_padding=0, loader=loader).train.batch(
        torch.arange(2), seed=0, epoch=0
    ).crop is None  # fmt: skip


def test_small_images_of_another_shape_keep_it(tmp_path):
    small_folder(tmp_path, (40, 60))
    for loader in LOADERS:
        found = evaluated(load(tmp_path, loader=loader, image_size=40))
        assert np.array_equal(found, pixels_of(tmp_path, "val")[:, :, 10:50])


def test_a_limit_does_not_change_the_rule(tmp_path):
    small_folder(tmp_path)
    for i in range(6):
        noise(tmp_path / "train" / "ant" / f"z{i}.png", (200, 150))
    for options in ({}, {"limit": 2}, {"train_limit": 2}):
        data = load(tmp_path, **options)
        assert data.preprocessing["crops"] == "photographs"
    assert load(tmp_path, crops="small").preprocessing["crops"] == "small"


def test_what_a_user_asks_for_comes_before_the_rule(tmp_path):
    small_folder(tmp_path)
    resized = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    paths = sorted((tmp_path / "val").glob("*/*"))
    expected = np.stack([np.asarray(resized(Image.open(path))) for path in paths]).astype(int)
    data = load(tmp_path, crops="photographs")
    assert np.abs(evaluated(data) - expected).max() <= 1
    assert data.train.batch(torch.arange(2), seed=0, epoch=0).crop is None
    assert "(--data.crops photographs)" in data.preprocessing["in_words"]
    with pytest.raises(UsageError, match=r"data.crops='round': expected auto, photographs"):
        load(tmp_path, crops="round")
    with pytest.raises(UsageError, match=r"data.crops='small' with data.name='cifar10'"):
        load_data(DataConfig(name="cifar10", crops="small"), CPU)


def test_what_stays_on_the_device(tmp_path, monkeypatch):
    from dfptkd.engine.data import file_data

    small_folder(tmp_path)
    facts = data_facts(DataConfig(name="folder", root=str(tmp_path), image_size=32))
    assert (facts.resident, facts.crop_padding) == (True, 4)
    assert load(tmp_path, loader="auto").pipeline["loader"] == "device"
    monkeypatch.setattr(file_data, "_RESIDENT_BYTES", 12 * 32 * 32 * 3 - 1)
    assert load(tmp_path, loader="auto").pipeline["loader"] != "device"
    facts = data_facts(DataConfig(name="folder", root=str(tmp_path), image_size=32))
    assert (facts.resident, facts.crop_padding) == (False, 4)
    photographs = DataConfig(name="folder", num_classes=1000, loader="device")
    assert not data_facts(photographs).resident


def config_of(root, out, **data):
    return RunConfig(
        method="ce", student="cifar:resnet8_s2", epochs=2, global_batch=6, out=str(out),
        data=DataConfig(name="folder", root=str(root), image_size=32, workers=0, **data),
    )  # fmt: skip


def test_the_first_lines_and_the_record_say_how_images_are_cut(tmp_path, capsys):
    small_folder(tmp_path / "data")
    noise(tmp_path / "data/train/ant/more/9.png", (32, 32))
    run(dataclasses.replace(config_of(tmp_path / "data", tmp_path / "out"), max_steps=1))
    said = capsys.readouterr().out.splitlines()
    expected = (
        "images of train/ and val/: 32x32 pixels, cut as small (by 12 headers): whole at 32 "
        "pixels, for training shifted by up to 4 pixels, flipped"
    )
    assert expected in said[1]
    assert "passed over: 1 image in a folder below that of its class" in said[2]
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["data"]["preprocessing"] == {
        "layout": "train/ and val/", "crops": "small", "side": 32, "shift": 4, "flip": True,
        "in_words": expected,
    }  # fmt: skip
    assert any("train/ant/more/9.png" in warning for warning in record["warnings"])


def test_a_run_from_before_the_rule_goes_on_and_is_evaluated_as_it_was(tmp_path, capsys):
    small_folder(tmp_path / "data")
    out = tmp_path / "out"
    config = config_of(tmp_path / "data", out, loader="torchvision", crops="photographs")
    run(dataclasses.replace(config, max_steps=1))
    newest = max((out / "checkpoints").glob("step-*"))
    for path in (out / "run.json", newest / "state.json"):
        record = json.loads(path.read_text())
        del record["config"]["data"]["crops"]  # as a run before had it
        path.write_text(json.dumps(record))
    (newest / "manifest.json").write_text(checkpoint._manifest(newest))
    auto = dataclasses.replace(config, data=dataclasses.replace(config.data, crops="auto"))
    before = json.loads((out / "status.json").read_text())["last"]["student_top1"]
    assert main(["eval", str(out)]) == 0
    assert f"top-1 {before:.2f} %" in capsys.readouterr().out
    result = run(auto)
    assert "cut as photographs (--data.crops photographs)" in capsys.readouterr().out
    assert result.step == 2
    with pytest.raises(DataError, match="RandomResizedCrop"):
        run(
            dataclasses.replace(
                config, max_steps=None, epochs=3, resume="extend",
                data=dataclasses.replace(config.data, crops="small"),
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "crops"),
    [
        ({"name": "folder", "loader": "auto"}, "photographs"),
        ({"name": "imagenet", "loader": "dali"}, "photographs"),
        ({"name": "cub200", "loader": "auto"}, "stretched"),
        ({"name": "tiny_imagenet", "loader": "auto"}, "small"),
        ({"name": "tiny_imagenet", "loader": "torchvision"}, "photographs"),
        ({"name": "folder", "loader": "device"}, "auto"),
        ({"name": "cifar100", "loader": "auto"}, "auto"),
        ({"name": "folder", "loader": "auto", "crops": "small"}, "small"),
    ],
)
def test_what_runs_did_before_there_was_a_choice(data, crops):
    assert crops_of_record(data) == crops


def test_loaders_that_only_read_give_the_same_names(tmp_path):
    """The endings that Pillow reads are read; none of them is passed over."""
    write_folder(tmp_path)
    picture = Image.open(tmp_path / "train/ant/0.jpg")
    for ending, kind in (("jfif", "JPEG"), ("pgm", "PPM"), ("avif", "AVIF"), ("jp2", "JPEG2000")):
        image = picture.convert("L") if ending == "pgm" else picture
        (tmp_path / "train" / "ant" / f"x.{ending}").write_bytes(encoded(image, kind))
    data = load(tmp_path, image_size=16)
    assert len(data.train) == 12 + 4
    assert data.passed_over == []
    (batch,) = train_batches(data.train, batch_size=16, seed=0, epoch=0)
    assert batch.images.shape == (16, 16, 16, 3)
