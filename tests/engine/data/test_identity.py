"""Who a data set is: the same wherever and however it lies, another where classes or images are."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from sample_images import encoded, picture, write_folder

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import load_data
from dfptkd.engine.data.look import LOOKED_AT
from dfptkd.engine.data.source import RawSplit, resident_data

CPU = torch.device("cpu")


def identity(root, name="folder", **options):
    options = {"loader": "torchvision", "image_size": 24, "workers": 0, **options}
    return load_data(DataConfig(name=name, root=str(root), **options), CPU).identity


def different(a, b):
    """The parts in which two data sets differ."""
    return [part for part in ("classes", "train", "test") if getattr(a, part) != getattr(b, part)]


def test_place_loader_and_limits_do_not_count(tmp_path):
    write_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    expected = identity(tmp_path / "here")
    assert identity(tmp_path / "there") == expected
    for options in ({"loader": "device"}, {"limit": 4}, {"train_limit": 2}, {"image_size": 16}):
        assert identity(tmp_path / "here", **options) == expected
    assert all(len(value) == 64 for value in vars(expected).values())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda root: [(root / s / "ant").rename(root / s / "asp") for s in ("train", "val")],
         ["classes"]),
        (lambda root: (root / "train/ant/0.jpg").rename(root / "train/ant/9.jpg"), ["train"]),
        (lambda root: (root / "train/ant/0.jpg").unlink(), ["train"]),
        (lambda root: (root / "val/bee/own.jpg").rename(root / "val/ant/own.jpg"), ["test"]),
        (lambda root: (root / "val/bee/3.jpg").write_bytes(encoded(picture(7))), ["test"]),
    ],
    ids=["class", "name", "number", "label", "bytes"],
)  # fmt: skip
def test_what_is_another_data_set(tmp_path, change, parts):
    write_folder(tmp_path)
    (tmp_path / "val/bee/own.jpg").write_bytes(encoded(picture(9)))
    before = identity(tmp_path)
    change(tmp_path)
    assert different(before, identity(tmp_path)) == parts


def test_images_of_the_same_size_under_the_same_name_are_told_apart(tmp_path):
    for seed, name in enumerate(("one", "two")):
        for split in ("train", "val"):
            for label in ("a", "b"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(3):
                    made = encoded(picture(10 * seed + i, (8, 8)), "BMP")
                    (folder / f"{i}.bmp").write_bytes(made)
    assert different(identity(tmp_path / "one"), identity(tmp_path / "two")) == ["train", "test"]


def test_a_folder_and_its_tar_files_are_one_data_set(tmp_path):
    write_folder(tmp_path / "folder")
    for split in ("train", "val"):
        files = sorted((tmp_path / "folder" / split).glob("*/*.jpg"), reverse=True)
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for path in files:
                label = str(int(path.parent.name == "bee")).encode()
                for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", label)):
                    info = tarfile.TarInfo(f"{path.parent.name}/{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert identity(tmp_path, "webdataset") == identity(tmp_path / "folder")


def test_only_a_bounded_number_of_files_is_read(tmp_path, monkeypatch):
    from dfptkd.engine.data.image_files import FolderFiles

    write_folder(tmp_path)
    one = (tmp_path / "train/ant/0.jpg").read_bytes()
    for i in range(LOOKED_AT + 40):
        (tmp_path / "train" / "ant" / f"more{i}.jpg").write_bytes(one)
    real, read = FolderFiles.read, []
    monkeypatch.setattr(FolderFiles, "read", lambda s, i: read.append(s.name(i)) or real(s, i))
    identity(tmp_path)
    training = [name for name in read if name.startswith("train")]
    assert len(training) == len(set(training)) == LOOKED_AT
    assert {name.split("/")[1] for name in training} == {"ant", "bee"}


def arrays(order, names=("a", "b"), pixel=0):
    images = np.arange(6 * 8 * 8 * 3, dtype=np.int64).reshape(6, 8, 8, 3).astype(np.uint8)
    images[0, 0, 0, 0] = pixel
    train = RawSplit(images[order], (np.arange(6) % 2)[order])
    test = RawSplit(images[:2], np.arange(2))
    return resident_data(
        DataConfig(name="cifar10"), CPU, train, test,
        class_names=list(names), mean=(0.5,) * 3, std=(0.2,) * 3, default_padding=4,
    ).identity  # fmt: skip


def test_arrays_in_memory():
    plain = arrays([0, 1, 2, 3, 4, 5])
    assert arrays([3, 1, 5, 0, 4, 2]) == plain
    assert different(arrays([0, 1, 2, 3, 4, 4]), plain) == ["train"]
    assert different(arrays([0, 1, 2, 3, 4, 5], names=("b", "a")), plain) == ["classes"]
    assert different(arrays([0, 1, 2, 3, 4, 5], pixel=9), plain) == ["train", "test"]


def test_synthetic_images():
    def made(**options):
        return load_data(DataConfig(name="synthetic", **options), CPU).identity

    assert made(limit=9) == made(limit=20)
    assert different(made(image_size=32), made(image_size=24)) == ["train", "test"]
    assert made(num_classes=10) != made(num_classes=11)
