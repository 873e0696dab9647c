"""DALI against Pillow, its order, its state, its failures (M25; faults 19, 20)."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import dali as dali_file
from dfptkd.engine.data import load_data, test_batches, train_batches
from dfptkd.engine.data.crops import CenterCrop, RandomResizedCrop, StretchedCrop
from dfptkd.engine.data.image_files import FolderFiles
from dfptkd.engine.data.torchvision_loader import TorchvisionSplit
from dfptkd.engine.errors import DataError, UsageError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

CPU = torch.device("cpu")
SIDE = 48
CROPS = [RandomResizedCrop(), StretchedCrop(random=True), CenterCrop(), CenterCrop(resize=1.0)]


def picture(width, height, seed=0):
    """A smooth picture with an edge: noise alone would hide a box that is off by a pixel."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).random(6) * 6
    waves = [np.sin(x / 5 + phase[c]) + np.cos(y / 7 + phase[c + 3]) for c in range(3)]
    pixels = (np.stack(waves, 2) * 60 + 127).astype(np.uint8)
    pixels[height // 3 : height // 2] //= 3
    return Image.fromarray(pixels)


def write_odd(root):
    """Names of images that decoders could treat differently."""
    exif = Image.Exif()
    exif[274] = 6
    image = picture(157, 118)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 71, 3), np.uint8))
    deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 77
    made = {
        "plain.jpg": (image, {}),
        "noise.jpg": (noise, {"quality": 95}),
        "full.jpg": (image, {"subsampling": "4:4:4"}),
        "half.jpg": (image, {"subsampling": "4:2:2"}),
        "progressive.jpg": (image, {"progressive": True}),
        "turned.jpg": (image, {"exif": exif}),
        "grey.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "rgb.png": (image, {}),
        "grey.png": (image.convert("L"), {}),
        "rgba.png": (image.convert("RGBA"), {}),
        "palette.png": (image.convert("P"), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "picture.gif": (image, {}),
        "picture.webp": (image, {}),
        "moving.png": (image, {"save_all": True, "append_images": [noise.resize(image.size)]}),
        "tiny.png": (image.resize((1, 2)), {}),
        "flat.png": (image.resize((300, 3)), {}),
    }
    for name, (made_image, options) in made.items():
        made_image.save(root / name, **options)
    return list(made)


def files_of(root, names):
    return FolderFiles(root, np.array([n.encode() for n in names]), torch.arange(len(names)) % 5)


@pytest.fixture
def files(tmp_path):
    """11 JPEGs of different sizes."""
    names = [f"{i}.jpg" for i in range(11)]
    for i, name in enumerate(names):
        picture(60 + 7 * i, 90 - 3 * i, i).save(tmp_path / name)
    return files_of(tmp_path, names)


def make(files, crops=CROPS[0], cls=dali_file.DaliSplit, *, in_dali=False):
    split = cls(files, crops, SIDE, CPU, flip=True)
    if in_dali:  # the graph of a GPU, on the CPU
        split.resize_in_dali = True
    return split


def rows_of(n, size):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1)).split(size)


def streamed(split, rows, **options):
    return list(split.stream(rows, seed=3, epoch=1, **{"workers": 2, **options}))


def same(a, b):
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "flip", "indices")
    )


def all_same(a, b):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def differences(a, b):
    return (a.images.int() - b.images.int()).abs()


@pytest.mark.parametrize("crops", CROPS, ids=repr)
@pytest.mark.parametrize("in_dali", [False, True])
def test_odd_images_look_as_in_pillow_M25(tmp_path, crops, in_dali):
    names = write_odd(tmp_path)
    files = files_of(tmp_path, names)
    rows = [torch.arange(len(names))] * 2
    ours = streamed(make(files, crops, in_dali=in_dali), rows)
    theirs = streamed(make(files, crops, TorchvisionSplit), rows, workers=0)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.flip, b.flip)
        difference = differences(a, b).float().mean((1, 2, 3))
        worst = names[int(difference.argmax())]
        assert difference.max() <= 0.6, f"{worst}: {difference.max():.2f} of 255"
        if not in_dali:  # PyTorch's rounding of two passes, or Pillow's own resizing
            assert differences(a, b).max() <= (2 if crops.cut_first else 0)


def test_boxes_a_pixel_off_fail_the_comparison(files, monkeypatch):
    # negative control of the limits above
    def shifted(self, samples, sizes, **options):
        return boxes(self, samples, sizes, **options) + torch.tensor([0, 1, 0, -1])

    theirs = make(files, cls=TorchvisionSplit).batch(torch.arange(11), seed=3, epoch=1)
    boxes = RandomResizedCrop.boxes
    monkeypatch.setattr(RandomResizedCrop, "boxes", shifted)
    ours = make(files).batch(torch.arange(11), seed=3, epoch=1)
    assert differences(ours, theirs).float().mean() > 0.6


@pytest.mark.parametrize("crops", CROPS, ids=repr)
def test_photographs_look_as_in_pillow_M25(shared_data, crops):
    root = shared_data / "jpeg-sample"
    files = files_of(root, sorted(str(p.relative_to(root)) for p in root.glob("*/*"))[:40])
    ours, theirs, in_dali = (
        split.batch(torch.arange(40), seed=0, epoch=0, side=160)
        for split in (
            make(files, crops),
            make(files, crops, TorchvisionSplit),
            make(files, crops, in_dali=True),
        )
    )
    assert ours.images.shape == (40, 160, 160, 3)
    assert differences(ours, theirs).max() <= (2 if crops.cut_first else 0)
    assert differences(ours, theirs).float().mean() < 0.05
    assert differences(in_dali, theirs).float().mean() < 0.25


def test_batches_come_in_the_order_of_rows_with_a_partial_last_one(files):
    rows = rows_of(11, 4)
    batches = streamed(make(files), rows)
    assert [b.indices.tolist() for b in batches] == [r.tolist() for r in rows]
    assert [len(b.images) for b in batches] == [4, 4, 3]
    assert (batches[0].images.dtype, batches[0].labels.dtype) == (torch.uint8, torch.int64)
    for batch in batches:
        assert torch.equal(batch.labels, batch.indices % 5)
        assert batch.crop is None
    assert streamed(make(files), []) == []


@pytest.mark.parametrize("in_dali", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_epoch_is_the_rest_of_a_whole_one(files, workers, in_dali):
    rows = rows_of(11, 2)
    whole = streamed(make(files, in_dali=in_dali), rows)
    for done in (0, 1, 4):
        rest = streamed(make(files, in_dali=in_dali), rows[done:], workers=workers)
        assert all_same(whole[done:], rest)


def test_a_stream_closed_early_leaves_the_next_one_right(files):
    split = make(files)
    rows = rows_of(11, 2)
    whole = streamed(split, rows)
    (decoder,) = split._idle
    for count in (0, 1, 3):
        stream = split.stream(rows, seed=3, epoch=0, workers=2)
        for _ in range(count):
            next(stream)
        stream.close()
        assert all_same(streamed(split, rows), whole)
    assert split._idle == [decoder]
    assert torch.equal(split.batch(rows[0], seed=3, epoch=1).images, whole[0].images)
    assert split._idle == [decoder]


def test_streams_that_take_turns_do_not_mix(files):
    split = make(files)
    rows = rows_of(11, 3)
    whole = streamed(split, rows)
    other = list(split.stream(rows, seed=4, epoch=1, workers=2))
    streams = [split.stream(rows, seed=seed, epoch=1, workers=2) for seed in (3, 4)]
    turns = list(zip(*streams, strict=True))
    assert all_same([a for a, _ in turns], whole)
    assert all_same([b for _, b in turns], other)
    assert not same(whole[0], other[0])


def test_another_side_needs_no_other_decoder(files):
    split = make(files)
    rows = rows_of(11, 4)
    for side in (SIDE, 32, 64):
        batches = streamed(split, rows, side=side)
        expected = make(files, cls=TorchvisionSplit).batch(rows[0], seed=3, epoch=1, side=side)
        assert batches[0].images.shape == (4, side, side, 3)
        assert differences(batches[0], expected).max() <= 2
        assert len(split._idle) == 1
    decoder = split._idle[0]
    streamed(split, rows, side=40)
    assert split._idle == [decoder]


def test_batches_stay_as_they_are_while_others_are_made(files):
    for in_dali in (False, True):
        split, copies, batches = make(files, in_dali=in_dali), [], []
        for epoch in range(4):
            for batch in split.stream(rows_of(11, 2), seed=0, epoch=epoch, workers=2):
                batches.append(batch)
                copies.append(batch.clone())
        assert len({b.images.data_ptr() for b in batches}) == len(batches) == 24
        assert all_same(batches, copies)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "vanished", "flipped"])
def test_undecodable_image_is_named(files, damage):
    path = files.root / "7.jpg"
    raw = path.read_bytes()
    split, rows = make(files), rows_of(11, 3)
    whole = streamed(split, rows)
    if damage == "vanished":
        path.unlink()
    elif damage == "flipped":  # a bit within a PNG, which has checksums
        file = io.BytesIO()
        picture(80, 70).save(file, "PNG")
        wrong = bytearray(file.getvalue())
        wrong[len(wrong) // 2] ^= 255
        path.write_bytes(wrong)
    else:
        path.write_bytes(
            {"truncated": raw[: len(raw) // 2], "empty": b"", "text": b"hello"}[damage]
        )
    with pytest.raises(DataError) as info:
        streamed(split, rows)
    message = str(info.value)
    assert message.startswith(f"{path}: cannot be ")
    assert "\n" not in message
    if damage != "vanished":
        assert "dfptkd verify-data" in message
    path.write_bytes(raw)
    assert all_same(streamed(split, rows), whole)


def test_what_dali_alone_cannot_decode_is_decoded_by_pillow(files, monkeypatch):
    """A GIF that is taken for plain: DALI refuses it."""
    rows = rows_of(11, 3)
    picture(80, 70).save(files.root / "7.jpg", "GIF")
    expected = streamed(make(files), rows)
    failed = []

    class Recorded(dali_file._DecodeError):
        def __init__(self, step, reason):
            super().__init__(step, reason)
            failed.append(step)

    monkeypatch.setattr(dali_file, "_DecodeError", Recorded)
    monkeypatch.setattr(
        dali_file, "plain_size", lambda data: Image.open(io.BytesIO(data)).size[::-1]
    )
    split = make(files)
    with pytest.warns(UserWarning, match=r"DALI cannot decode this batch, though Pillow can"):
        found = streamed(split, rows)
    assert all_same(found, expected)
    assert failed == [next(step for step, row in enumerate(rows) if 7 in row)]
    assert len(split._idle) == 1


def test_a_batch_that_dali_never_decodes_names_its_files(files, monkeypatch):
    split, rows, as_ppm = make(files), rows_of(11, 4), dali_file._as_ppm
    whole = streamed(split, rows)
    with monkeypatch.context() as patch:
        patch.setattr(dali_file, "plain_size", lambda data: None)
        patch.setattr(
            dali_file,
            "_as_ppm",
            lambda image: as_ppm(image) if image.size == (1, 1) else b"P6 nonsense",
        )
        with pytest.raises(DataError) as info:
            streamed(split, rows)
    message = str(info.value)
    assert message.startswith(", ".join(files.where(int(i)) for i in rows[0][:3]) + " and 1 others")
    assert "dfptkd verify-data" in message
    assert "\n" not in message
    assert split._idle == []
    assert all_same(streamed(split, rows), whole)


def test_shards_give_the_images_of_a_folder(tmp_path):
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}-0.tar", "w") as tar:
            for label in range(2):
                (folder / split / str(label)).mkdir(parents=True)
                for i in range(3):
                    path = folder / split / str(label) / f"{label}{i}.jpg"
                    picture(80 + 9 * i, 70, i + label).save(path)
                    tar.add(path, path.name)
                    info = tarfile.TarInfo(f"{label}{i}.cls")
                    info.size = 1
                    tar.addfile(info, io.BytesIO(str(label).encode()))
    found = []
    for name, root in (("folder", folder), ("webdataset", shards)):
        config = DataConfig(name=name, root=str(root), image_size=SIDE, loader="dali")
        data = load_data(config, CPU)
        assert data.pipeline["loader"] == "dali"
        train = list(train_batches(data.train, batch_size=2, seed=0, epoch=0, workers=2))
        found.append((train, list(test_batches(data.test, batch_size=4, workers=2))))
    (a_train, a_test), (b_train, b_test) = found
    assert all_same(a_train, b_train)
    assert [len(b.labels) for b in a_test] == [4, 2]
    assert all(torch.equal(a.images, b.images) for a, b in zip(a_test, b_test, strict=True))


def test_description_is_of_what_the_pixels_depend_on(files):
    descriptions = [
        make(files).describe(),
        make(files, CenterCrop()).describe(),
        make(files, in_dali=True).describe(),
        make(files, cls=TorchvisionSplit).describe(),
    ]
    assert len({str(d) for d in descriptions}) == 4
    assert make(files).describe() == descriptions[0]
    assert descriptions[0]["loader"] == "dali"


def test_a_dali_that_does_not_start_is_a_line(files, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA driver\nis too old")

    monkeypatch.setattr(dali_file, "_build_pipeline", broken)
    with pytest.raises(
        UsageError, match=r"^data.loader='dali': .*\(CUDA driver is too old\).*torch"
    ):
        streamed(make(files), rows_of(11, 4))
