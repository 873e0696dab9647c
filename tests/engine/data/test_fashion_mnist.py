"""Fashion-MNIST: the idx format and the three places where a copy is found."""

import gzip
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import fashion_mnist, load_data
from dfptkd.engine.data.fashion_mnist import parse_idx
from dfptkd.engine.errors import DataError, StorageError

CPU = torch.device("cpu")
TRAIN, TEST = 30, 20


def idx(array) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), 1)


def write_files(folder: Path, seed: int = 0) -> np.ndarray:
    """The four files in small; returns the training images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for prefix, count in (("t10k", TEST), ("train", TRAIN)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return images


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch, tmp_path):
    """Small files, a cache of the test's own, no system copy, no network."""
    monkeypatch.setattr(fashion_mnist, "_NUM_TRAIN", TRAIN)
    monkeypatch.setattr(fashion_mnist, "_NUM_TEST", TEST)
    monkeypatch.setattr(fashion_mnist, "_SYSTEM_FOLDER", Path("nowhere/fashion-mnist"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", no_network)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def no_network(scratch):
    raise DataError("Name or service not known")


def load(root=None, **options):
    return load_data(DataConfig(name="fashion_mnist", root=root and str(root), **options), CPU)


def fake_debian(tmp_path, package: Path, *, lists: bool) -> Path:
    """apt-get and dpkg-deb in small: `package` is a folder; no `lists`: apt must update first."""
    log = tmp_path / "calls"
    apt = f"""
open({str(log)!r}, "a").write("apt-get " + " ".join(a for a in args if a[0] not in "-D") + chr(10))
private = any(a.startswith("Dir::State::lists=") for a in args)
if "update" in args:
    folder = [a.split("=")[1] for a in args if a.startswith("Dir::State::lists=")][0]
    open(os.path.join(folder, "index"), "w").close()
    sys.exit("E: Problem executing scripts")
folder = [a.split("=")[1] for a in args if a.startswith("Dir::State::lists=")]
if not ({lists} or folder and os.path.exists(os.path.join(folder[0], "index"))):
    sys.exit("E: Unable to locate package dataset-fashion-mnist")
open("dataset-fashion-mnist_1_all.deb", "w").close()
"""
    dpkg = f"""
shutil.copytree({str(package)!r}, os.path.join(args[2], "nowhere/fashion-mnist"))
"""
    for name, body in (("apt-get", apt), ("dpkg-deb", dpkg)):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        prologue = f"#!{sys.executable} -IS\nimport os, shutil, sys\nargs = sys.argv[1:]\n"
        script.write_text(prologue + body)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return log


@pytest.mark.parametrize("inside", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_local_copy(tmp_path, inside):
    images = write_files(tmp_path / "data" / inside)
    data = load(tmp_path / "data")
    assert (len(data.train), len(data.test), data.num_classes) == (TRAIN, TEST, 10)
    assert data.image_size == (28, 28)
    assert data.train.images.shape == (TRAIN, 28, 28, 3)
    for channel in range(3):
        assert np.array_equal(data.train.images[..., channel].numpy(), images)
    assert data.train.batch(torch.arange(4), seed=0, epoch=0).crop[0] == 2
    assert (
        load(tmp_path / "data", crop_padding=3, flip=False)
        .train.batch(torch.arange(4), seed=0, epoch=0)
        .flip
        is None
    )


@pytest.mark.parametrize("lists", [True, False], ids=["package-lists", "no-package-lists"])
def test_debian_package_then_cache(tmp_path, capfd, lists):
    images = write_files(tmp_path / "package")
    log = fake_debian(tmp_path, tmp_path / "package", lists=lists)
    data = load()
    assert np.array_equal(data.train.images[..., 0].numpy(), images)
    expected = ["apt-get download dataset-fashion-mnist"]
    if not lists:
        expected += ["apt-get update", expected[0]]
    assert log.read_text().splitlines() == expected
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    cache = tmp_path / "cache" / "dfptkd" / "fashion-mnist"
    assert sorted(p.name for p in cache.iterdir()) == sorted(fashion_mnist._FILES)
    log.unlink()
    load()
    assert not log.exists()  # the second time nothing is fetched


def test_torchvision_comes_before_debian(tmp_path, monkeypatch):
    write_files(tmp_path / "package", seed=0)
    log = fake_debian(tmp_path, tmp_path / "package", lists=True)

    def download(scratch):
        write_files(scratch / "raw", seed=1)
        return scratch / "raw"

    monkeypatch.setattr(fashion_mnist, "_from_torchvision", download)
    load()
    assert not log.exists()


def test_fetched_rubbish_never_reaches_the_cache(tmp_path):
    write_files(tmp_path / "package")
    (tmp_path / "package" / "train-images-idx3-ubyte.gz").write_bytes(b"<html>")
    fake_debian(tmp_path, tmp_path / "package", lists=True)
    with pytest.raises(DataError, match="damaged gzip file"):
        load()
    assert not (tmp_path / "cache").exists()


def test_failure_names_all_three_ways(tmp_path):
    with pytest.raises(DataError) as info:
        load()
    message = str(info.value)
    assert "\n" not in message
    for part in (
        "--data.root",
        "DFPTKD_DATA",
        "Name or service not known",
        "dataset-fashion-mnist",
    ):
        assert part in message
    assert "train-images-idx3-ubyte.gz" in message


def test_missing_root_is_an_error_rather_than_a_download(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "typo")


def test_unwritable_cache(tmp_path):
    write_files(tmp_path / "package")
    fake_debian(tmp_path, tmp_path / "package", lists=True)
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        load()


def test_download_process_is_bounded_and_quiet(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fashion_mnist, "_FETCH_TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match=r"took more than 0\.2 s"):
        fashion_mnist._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    monkeypatch.setattr(fashion_mnist, "_FETCH_TIMEOUT_S", 60)
    code = "import sys; print('noise'); sys.exit('first\\nsecond')"
    with pytest.raises(DataError, match=r"^second$"):
        fashion_mnist._run([sys.executable, "-ISc", code], tmp_path)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1, exclude_max=True), position=st.integers(0, 15), value=st.integers(0, 255)
)
def test_damaged_idx_is_refused(share, position, value):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    good = idx(array)
    assert np.array_equal(parse_idx(good, "f", (2, 3, 4)), array)
    with pytest.raises(DataError, match=r"^f: "):
        parse_idx(good[: int(share * len(good))], "f", (2, 3, 4))
    raw = bytearray(gzip.decompress(good))
    with pytest.raises(DataError, match=r"^f: "):
        parse_idx(gzip.compress(bytes(raw[:-1])), "f", (2, 3, 4))
    if raw[position] != value:
        raw[position] = value
        with pytest.raises(DataError, match=r"^f: found header"):
            parse_idx(gzip.compress(bytes(raw)), "f", (2, 3, 4))


def test_label_out_of_range(tmp_path):
    write_files(tmp_path / "data")
    labels = np.full(TEST, 10, np.uint8)
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    with pytest.raises(DataError, match=r"t10k-labels.*label 10 in record 0, expected 0\.\.9"):
        load(tmp_path / "data")


def test_cache_lies_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    expected = os.path.join("/home/someone", ".cache", "dfptkd", "fashion-mnist")
    assert str(fashion_mnist.cache_folder()) == expected
