"""CIFAR archives: every published form is read, every damaged one refused (M24; faults 17, 20)."""

import dataclasses
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import cifar, load_data
from dfptkd.engine.data.cifar import parse_binary, parse_python
from dfptkd.engine.errors import DataError

CPU = torch.device("cpu")
TRAIN, TEST = 200, 100


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: protocol 2, byte strings, numpy's old module name."""

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def python2_pickle(content) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    # the module name is a text line of the GLOBAL opcode, so its length is free
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def tiny(monkeypatch):
    """Both data sets with fewer records, so that a test can write whole archives."""
    for name, cifar_set in list(cifar._SETS.items()):
        small = dataclasses.replace(cifar_set, num_train=TRAIN, num_test=TEST)
        monkeypatch.setitem(cifar._SETS, name, small)


def records(num_records, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_records) % num_classes
    return rng.integers(0, 256, (num_records, 3072), np.uint8), labels


def write_archives(root, name):
    """The same tiny data set in both unpacked forms; returns train pixels and labels."""
    num_classes = cifar._SETS[name].num_classes
    layouts = cifar._SETS[name].layouts
    parts = len(layouts[0].train)
    pixels, labels = records(TRAIN, num_classes)
    test_pixels, test_labels = records(TEST, num_classes, seed=1)
    content = [*zip(np.split(pixels, parts), np.split(labels, parts), strict=True)]
    content.append((test_pixels, test_labels))
    names = [b"class_%d" % i for i in range(num_classes)]
    for layout in layouts:
        folder = root / layout.folder
        folder.mkdir(parents=True)
        for file, (x, y) in zip((*layout.train, *layout.test), content, strict=True):
            if layout.python:
                key = cifar._SETS[name].label_key
                raw = python2_pickle({b"batch_label": b"x", b"data": x, key: y.tolist()})
            else:
                coarse = [np.full_like(y, 7)] * (cifar._SETS[name].label_bytes - 1)
                raw = np.column_stack([*coarse, y, x]).astype(np.uint8).tobytes()
            (folder / file).write_bytes(raw)
        listed = python2_pickle({cifar._SETS[name].names_key: names})
        (folder / layout.names).write_bytes(
            listed if layout.python else b"\n".join(names) + b"\n\n"
        )
    return pixels, labels


def pack(root, layout):
    with tarfile.open(root / layout.archive, "w:gz") as tar:
        tar.add(root / layout.folder, layout.folder)
    for file in (root / layout.folder).iterdir():
        file.unlink()
    (root / layout.folder).rmdir()


def remove(root, layout):
    for file in (root / layout.folder).iterdir():
        file.unlink()
    (root / layout.folder).rmdir()


def config(root, name="cifar100", **options):
    return DataConfig(name=name, root=str(root), **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [0, 1], ids=["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_published_form_gives_the_same_images(tiny, tmp_path, name, form, packed):
    pixels, labels = write_archives(tmp_path, name)
    layouts = cifar._SETS[name].layouts
    remove(tmp_path, layouts[1 - form])
    if packed:
        pack(tmp_path, layouts[form])
    data = load_data(config(tmp_path, name), CPU)
    assert (len(data.train), len(data.test)) == (TRAIN, TEST)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.tolist() == labels.tolist()
    # channel c of pixel (row, column) is byte 1024 c + 32 row + column of the record
    assert data.train.images[17, 5, 9].tolist() == [pixels[17, 1024 * c + 169] for c in range(3)]
    assert data.class_names[3] == "class_3"
    assert data.num_classes == len(data.class_names) == cifar._SETS[name].num_classes


def test_root_may_be_the_archive_folder_itself(tiny, tmp_path):
    write_archives(tmp_path, "cifar100")
    for folder in ("cifar-100-binary", "cifar-100-python"):
        assert len(load_data(config(tmp_path / folder), CPU).train) == TRAIN


def test_root_from_the_environment(tiny, tmp_path, monkeypatch):
    write_archives(tmp_path, "cifar10")
    monkeypatch.setenv("DFPTKD_DATA", str(tmp_path))
    assert len(load_data(DataConfig(name="cifar10"), CPU).test) == TEST


def test_no_root_names_both_ways_to_give_one():
    with pytest.raises(DataError, match=r"--data\.root.*DFPTKD_DATA.*cifar-100-binary/"):
        load_data(DataConfig(name="cifar100"), CPU)


def test_missing_data_lists_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"cifar-100-binary/ or .*cifar-100-python\.tar\.gz"
    ) as info:
        load_data(config(tmp_path), CPU)
    assert str(tmp_path) in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.raises(DataError, match="no such folder"):
        load_data(config(tmp_path / "nowhere"), CPU)


def test_full_size_is_required(tmp_path):
    # without the `tiny` fixture: a small archive is a damaged one
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"\0" * 3074 * 10)
    (folder / "test.bin").write_bytes(b"\0" * 3074 * 10)
    with pytest.raises(DataError, match=r"train\.bin: found 30,740 bytes, expected 153,700,000"):
        load_data(config(tmp_path), CPU)


def test_missing_file_is_named(tiny, tmp_path):
    write_archives(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: cannot be read"):
        load_data(config(tmp_path, "cifar10"), CPU)


def test_wrong_class_names_are_refused(tiny, tmp_path):
    write_archives(tmp_path, "cifar100")
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("apple\npear\n")
    with pytest.raises(
        DataError, match=r"fine_label_names\.txt: found 2 class names, expected 100"
    ):
        load_data(config(tmp_path), CPU)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_binary_of_any_other_length_is_refused(data):
    pixels, labels = records(3, 10)
    raw = np.column_stack([labels, pixels]).astype(np.uint8).tobytes()
    length = data.draw(st.integers(0, 2 * len(raw)).filter(lambda n: n != len(raw)))
    with pytest.raises(DataError, match=r"^some\.bin: found .* expected 9,219"):
        parse_binary((raw * 2)[:length], "some.bin", label_bytes=1, num_records=3, num_classes=10)


@settings(max_examples=60, deadline=None)
@given(record=st.integers(0, 2), label=st.integers(0, 255))
def test_binary_label_range(record, label):
    pixels, labels = records(3, 10)
    table = np.column_stack([np.full(3, 255), labels, pixels]).astype(np.uint8)
    table[record, 1] = label
    options = {"label_bytes": 2, "num_records": 3, "num_classes": 10}
    if label < 10:
        assert parse_binary(table.tobytes(), "f", **options).labels[record] == label
    else:
        with pytest.raises(DataError, match=f"label {label} in record {record}, expected 0..9"):
            parse_binary(table.tobytes(), "f", **options)


PYTHON = {"label_key": b"labels", "num_records": 3, "num_classes": 10}


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_pickle_is_refused(share):
    pixels, labels = records(3, 10)
    raw = python2_pickle({b"data": pixels, b"labels": labels.tolist()})
    assert len(parse_python(raw, "f", **PYTHON).labels) == 3
    with pytest.raises(DataError, match=r"^f: "):
        parse_python(raw[: int(share * len(raw))], "f", **PYTHON)


@pytest.mark.parametrize(
    "change",
    [
        {b"data": np.zeros((3, 3071), np.uint8)},
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((3, 3072), np.int8)},
        {b"data": np.asfortranarray(np.zeros((3, 3072), np.uint8))},
        {b"data": np.zeros((3, 3072), object)},
        {b"data": [1, 2]},
        {b"labels": [0, 1]},
        {b"labels": [0, 1, 10]},
        {b"labels": [0, 1, -1]},
        {b"labels": [0, 1, 2**80]},
        {b"labels": [0, 1, "2"]},
        {b"labels": b"012"},
    ],
    ids=str,
)
def test_wrong_pickled_content_is_refused(change):
    pixels, labels = records(3, 10)
    with pytest.raises(DataError, match=r"^f: .*expected") as info:
        parse_python(
            python2_pickle({b"data": pixels, b"labels": labels.tolist(), **change}), "f", **PYTHON
        )
    assert "\n" not in str(info.value)


class Attack:
    """Unpickled by Python's own unpickler, this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["data", "labels", "root"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, where):
    attack = Attack(tmp_path / "owned")
    content = attack if where == "root" else {where.encode(): attack}
    raw = pickle.dumps(content, protocol=2)
    with pytest.raises(DataError, match="refused to load"):
        parse_python(raw, "f", **PYTHON)
    assert not (tmp_path / "owned").exists()
    pickle.loads(raw)  # negative control: the attack works on an unrestricted unpickler
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", [b"builtins\neval", b"numpy\nload", b"numpy\nfromfile", b"copyreg\n_reconstructor"]
)
def test_no_other_global_is_resolved(name):
    with pytest.raises(DataError, match="refused to load"):
        parse_python(b"\x80\x02c" + name + b"\n.", "f", **PYTHON)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_damaged_archive_is_refused(tiny, tmp_path, keep):
    write_archives(tmp_path, "cifar100")
    binary, python = cifar._SETS["cifar100"].layouts
    remove(tmp_path, python)
    pack(tmp_path, binary)
    archive = tmp_path / binary.archive
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz: damaged archive"):
        load_data(config(tmp_path), CPU)


def test_archive_members_cannot_write_or_link(tiny, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "cifar-100-binary.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        escape = tarfile.TarInfo("../escaped")
        escape.size = 1
        tar.addfile(escape, io.BytesIO(b"y"))
    with pytest.raises(DataError, match=r"no member cifar-100-binary/train\.bin"):
        load_data(config(root), CPU)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "secret"]
    assert [p.name for p in root.iterdir()] == ["cifar-100-binary.tar.gz"]


@pytest.fixture(scope="module")
def real(cifar100_root):
    return load_data(DataConfig(name="cifar100", root=str(cifar100_root)), CPU)


def test_real_cifar100_has_the_published_facts_M24(real):
    assert (len(real.train), len(real.test), real.num_classes) == (50_000, 10_000, 100)
    assert torch.bincount(real.train.labels).tolist() == [500] * 100
    assert torch.bincount(real.test.labels).tolist() == [100] * 100
    assert (real.class_names[0], real.class_names[99]) == ("apple", "worm")
    assert real.train.images.shape == (50_000, 32, 32, 3)
    # mean and std over all training pixels are the published constants: a wrong channel order fails
    for channel in range(3):
        pixels = real.train.images[..., channel].numpy().ravel()
        share = np.bincount(pixels, minlength=256) / len(pixels)
        values = np.arange(256) / 255
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum() ** 0.5
        assert mean == pytest.approx(real.mean[channel], abs=2e-4)
        assert std == pytest.approx(real.std[channel], abs=2e-3)


def test_real_cifar100_pixels_equal_the_sheets_M24(real, shared_data):
    image = pytest.importorskip("PIL.Image")
    sheet = image.open(next((shared_data / "cifar100" / "test").glob("41-*.webp"))).convert("RGB")
    tile = np.asarray(sheet)[:32, 32:64]
    position = int((real.test.labels == 41).nonzero()[1])
    assert np.array_equal(real.test.images[position].numpy(), tile)


def test_augmented_batch_M24(real):
    indices = torch.tensor([3, 49_999, 7])
    batch = real.train.batch(indices, seed=0, epoch=0)
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (3, 32, 32, 3))
    assert (batch.labels.dtype, batch.labels.shape) == (torch.int64, (3,))
    padding, offsets = batch.crop
    assert (padding, offsets.dtype, offsets.shape) == (4, torch.int64, (3, 2))
    assert (batch.flip.dtype, batch.flip.shape) == (torch.bool, (3,))
    assert batch.indices.tolist() == indices.tolist()
    assert torch.equal(batch.images, real.train.images[indices])
    plain = real.test.batch(indices % 100, seed=0, epoch=0)
    assert plain.crop is None
    assert plain.flip is None
