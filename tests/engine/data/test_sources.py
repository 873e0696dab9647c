"""Official layouts of ImageNet, CUB-200, Tiny-ImageNet, and tar shards, on small trees."""

import io
import tarfile

import numpy as np
import pytest
import torch
from sample_images import encoded, picture, write_folder

from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import (
    load_data,
    steps_per_epoch,
    test_batches,
    train_batches,
    webdataset,
)
from dfptkd.engine.data.crops import CenterCrop, RandomResizedCrop, StretchedCrop, side_of_epoch
from dfptkd.engine.errors import DataError, UsageError

CPU = torch.device("cpu")
IDS = ("n01440764", "n01443537", "n02084071", "n15075141")  # the third is none of the 1000


def load(name, root, **options):
    options = {"loader": "torchvision", "image_size": 24, **options}
    return load_data(DataConfig(name=name, root=str(root), **options), CPU)


def names(split):
    files = split.decoding.files if hasattr(split, "decoding") else split.files
    return [files.name(i) for i in range(len(files))]


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), quality=92))


# CUB-200 -----------------------------------------------------------------------------------------


@pytest.fixture
def cub(tmp_path):
    """Three classes of four images; the first two of each are for training."""
    folder = tmp_path / "CUB_200_2011"
    images, split, labels = [], [], []
    for i in range(12):
        name = f"{i // 4 + 1:03}.Bird/Bird_{i}.jpg"
        save(folder / "images" / name, i)
        images.append(f"{i + 1} {name}")
        split.append(f"{i + 1} {int(i % 4 < 2)}")
        labels.append(f"{i + 1} {i // 4 + 1}")
    classes = [f"{c} {c:03}.Bird" for c in (1, 2, 3)]
    for name, lines in (
        ("images", images), ("train_test_split", split), ("image_class_labels", labels),
        ("classes", classes),
    ):  # fmt: skip
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_cub200_official_split(cub):
    data = load("cub200", cub)
    assert data.class_names == ["001.Bird", "002.Bird", "003.Bird"]
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names(data.train)[:3] == [
        f"CUB_200_2011/images/{n}"
        for n in ("001.Bird/Bird_0.jpg", "001.Bird/Bird_1.jpg", "002.Bird/Bird_4.jpg")
    ]
    assert names(data.test)[0] == "CUB_200_2011/images/001.Bird/Bird_2.jpg"
    assert len(load("cub200", cub / "CUB_200_2011").train) == 6  # the inner folder serves as well
    batch = next(train_batches(data.train, batch_size=6, seed=0, epoch=0))
    assert batch.images.shape == (6, 24, 24, 3)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("images.txt", "1 001", "x 001", "line 'x 001.Bird/Bird_0.jpg'"),
        ("images.txt", "2 001", "1 001", "expected a number of its own"),
        ("train_test_split.txt", "12 0\n", "", "image 12 is in it or in images.txt"),
        ("train_test_split.txt", " 0", " 1", "no image is marked 0"),
        ("image_class_labels.txt", "5 2", "5 9", "image 5 has class '9'"),
        ("classes.txt", "2 002.Bird\n3 003.Bird\n", "", "found 1 classes"),
        ("images.txt", "1 001.Bird/Bird_0.jpg", "1 001.Bird/gone.jpg", "no such file"),
    ],
)
def test_cub200_contradictions_are_named(cub, file, old, new, said):
    path = cub / "CUB_200_2011" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as info:
        load("cub200", cub)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


def test_cub200_table_missing(cub):
    (cub / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"found no classes.txt, expected CUB_200_2011"):
        load("cub200", cub)


# Tiny-ImageNet -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    ids = ("n02", "n01")
    for c, name in enumerate(ids):
        for i in range(3):
            save(folder / "train" / name / "images" / f"{name}_{i}.JPEG", 10 * c + i)
    lines = []
    for i in range(5):
        save(folder / "val" / "images" / f"val_{i}.JPEG", 50 + i)
        lines.append(f"val_{i}.JPEG\t{ids[i % 2]}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    return tmp_path


def test_tiny_imagenet_lies_on_the_device(tiny):
    data = load("tiny_imagenet", tiny, loader="auto", image_size=16)
    assert data.class_names == ["n01", "n02"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [1, 0, 1, 0, 1]
    assert data.train.images.shape == (6, 16, 16, 3)
    batch = next(train_batches(data.train, batch_size=4, seed=0, epoch=0))
    assert batch.crop[0] == 2  # an eighth of the side, as 4 of CIFAR's 32
    assert batch.flip is not None
    files = load("tiny_imagenet", tiny, image_size=48)
    whole = next(test_batches(load("tiny_imagenet", tiny, loader="device", image_size=48).test,
                              batch_size=5))  # fmt: skip
    assert names(files.test)[0] == "tiny-imagenet-200/val/images/val_0.JPEG"
    expected = np.asarray(picture(50).crop((8, 0, 56, 48))).astype(int)
    assert np.abs(whole.images[0].numpy() - expected).mean() < 4  # JPEG's loss


def test_tiny_imagenet_unknown_label(tiny):
    path = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n01", "n99"))
    with pytest.raises(DataError, match=r"'val_1.JPEG' has class 'n99'"):
        load("tiny_imagenet", tiny)


def test_progressive_resizing_of_resident_images_is_refused(tiny):
    with pytest.raises(UsageError, match=r"expected --data.loader dali or torchvision"):
        load("tiny_imagenet", tiny, loader="auto", start_size=16)


# Tar shards --------------------------------------------------------------------------------------


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("soon_read", [0, 1 << 30])  # in processes of their own, or here
def test_webdataset_gives_the_bytes_of_a_folder(tmp_path, monkeypatch, soon_read):
    monkeypatch.setattr(webdataset, "_SOON_READ", soon_read)
    paths = write_folder(tmp_path / "folder")
    for split in ("train", "val"):
        files = sorted((tmp_path / "folder" / split).glob("*/*.jpg"))
        for number, part in enumerate((files[:3], files[3:])):
            members = []
            for path in part:
                key = f"{path.parent.name}-{path.stem}"
                members += [(f"{key}.jpg", path.read_bytes()), (f"{key}.json", b"{}")]
                members.append((f"{key}.cls", str(int(path.parent.name == "bee")).encode()))
            shard(tmp_path / f"{split}-{number:04}.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    tar, folder = load("webdataset", tmp_path), load("folder", tmp_path / "folder")
    assert tar.class_names == folder.class_names
    assert names(tar.train)[0] == "train-0000.tar/ant-0.jpg"
    assert tar.train.files.read(7) == paths[7].read_bytes()
    for split in ("train", "test"):
        assert torch.equal(getattr(tar, split).labels, getattr(folder, split).labels)
    options = {"batch_size": 4, "seed": 1, "epoch": 2}
    for workers in (0, 2):
        ours = train_batches(tar.train, **options, workers=workers)
        for a, b in zip(ours, train_batches(folder.train, **options), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
    limited = load("webdataset", tmp_path, train_limit=4).train
    assert torch.bincount(limited.labels).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", b"x")], "a.jpg: no .cls beside it"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls: expected a class number"),
        ([("a.cls", b"0")], "no image"),
        (None, "expected an uncompressed tar file"),
    ],
)
def test_webdataset_refusals(tmp_path, members, said):
    good = [("a.jpg", encoded(picture())), ("a.cls", b"1")]
    shard(tmp_path / "train-0.tar", good)
    shard(tmp_path / "val-0.tar", good)
    if members is None:
        (tmp_path / "train-0.tar").write_bytes(b"not a tar file" * 100)
    else:
        shard(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError) as info:
        load("webdataset", tmp_path)
    assert said in str(info.value)


def test_webdataset_cut_short_after_its_index(tmp_path):
    good = [("a.jpg", encoded(picture())), ("a.cls", b"1"), ("b.jpg", encoded(picture(1))),
            ("b.cls", b"0")]  # fmt: skip
    for split in ("train", "val"):
        shard(tmp_path / f"{split}-0.tar", good)
    data = load("webdataset", tmp_path)
    with open(tmp_path / "train-0.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(DataError, match=r"train-0.tar: ends within train-0.tar/a.jpg"):
        data.train.batch(torch.tensor([0]), seed=0, epoch=0)


# ImageNet ----------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    """Train folders of two of the 1000 classes, and a flat val/ of four images."""
    for c in (0, 1):
        for i in range(3):
            save(tmp_path / "train" / IDS[c] / f"{IDS[c]}_{i}.JPEG", 10 * c + i)
    for i in range(4):
        save(tmp_path / "val" / f"ILSVRC2012_val_0000000{i + 1}.JPEG", 50 + i)
    return tmp_path


def devkit(root, archive, truth=(7, 3, 3, 7)):
    io_module = pytest.importorskip("scipy.io")
    kit = root / "ILSVRC2012_devkit_t12"
    (kit / "data").mkdir(parents=True)
    (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{number}\n" for number in truth)
    )
    synsets = np.array(
        [(7, IDS[0]), (3, IDS[1])], dtype=[("ILSVRC2012_ID", object), ("WNID", object)]
    )
    io_module.savemat(kit / "data" / "meta.mat", {"synsets": synsets})
    if archive:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            tar.add(kit, kit.name)
        kit.rename(root / "elsewhere")


@pytest.mark.parametrize("form", ["devkit", "archive", "csv"])
def test_imagenet_flat_validation(imagenet, form):
    pytest.importorskip("timm")
    if form == "csv":
        labels = [IDS[c] for c in (0, 1, 1, 0)]
        rows = [f"ILSVRC2012_val_0000000{i},{c} 1 2 3 4 " for i, c in enumerate(labels, start=1)]
        (imagenet / "LOC_val_solution.csv").write_text("\n".join(["ImageId,P", *reversed(rows)]))
    else:
        devkit(imagenet, archive=form == "archive")
    data = load("imagenet", imagenet)
    assert data.num_classes == 1000
    assert data.class_names[:2] == list(IDS[:2])
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1, 1, 0]
    assert steps_per_epoch(len(data.train), 4) == 1


def test_imagenet_keeps_the_numbers_of_missing_classes(imagenet):
    pytest.importorskip("timm")
    for folder in ("train", "val"):
        for i in range(2):
            save(imagenet / folder / IDS[3] / f"{i}.JPEG", i)
    for i in range(4):
        (imagenet / "val" / f"ILSVRC2012_val_0000000{i + 1}.JPEG").unlink()
    for c in (0, 1):
        save(imagenet / "val" / IDS[c] / "x.JPEG", c)
    data = load("imagenet", imagenet)
    assert data.train.labels.unique().tolist() == [0, 1, 999]
    assert data.test.labels.tolist() == [0, 1, 999, 999]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no labels", "flat val/ without labels"),
        ("few labels", "4 validation images, but the devkit has 3 labels"),
        ("unknown number", "class 5 is not in meta.mat"),
        ("text", "expected a class number a line"),
        ("no mat", "expected the devkit's meta.mat"),
        ("csv", "no label for it"),
        ("folder", "no WordNet id"),
        ("class", "none of ImageNet's 1000 classes"),
    ],
)
def test_imagenet_refusals(imagenet, damage, said):
    pytest.importorskip("timm")
    kit = imagenet / "ILSVRC2012_devkit_t12" / "data"
    if damage == "few labels":
        devkit(imagenet, archive=False, truth=(7, 3, 3))
    elif damage == "unknown number":
        devkit(imagenet, archive=False, truth=(7, 3, 3, 5))
    elif damage in ("text", "no mat"):
        devkit(imagenet, archive=False)
        file = "meta.mat" if damage == "no mat" else "ILSVRC2012_validation_ground_truth.txt"
        (kit / file).write_text("seven")
    elif damage == "csv":
        (imagenet / "LOC_val_solution.csv").write_text("ImageId,P\nILSVRC2012_val_00000001,n9 1\n")
    elif damage == "folder":
        save(imagenet / "train" / "cats" / "1.JPEG")
    elif damage == "class":
        save(imagenet / "train" / IDS[2] / "1.JPEG")
    with pytest.raises(DataError) as info:
        load("imagenet", imagenet)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


# Crops -------------------------------------------------------------------------------------------


def test_center_crop_box():
    box = CenterCrop().boxes(
        torch.zeros(1, dtype=torch.int64), torch.tensor([[375, 500]]), seed=0, epoch=0, side=224
    )
    # Resize(256): 256 x 341; CenterCrop(224): from row 16, column round(58.5) = 58
    scale = torch.tensor([375 / 256, 500 / 341], dtype=torch.float64)
    expected = torch.cat([torch.tensor([16.0, 58.0]).double() * scale, 224 * scale])
    assert torch.allclose(box[0], expected, rtol=1e-12)


def test_stretched_crops_cover_their_square():
    samples, sizes = torch.arange(2000), torch.tensor([[300, 512]]).expand(2000, 2)
    boxes = StretchedCrop(random=True).boxes(samples, sizes, seed=0, epoch=0, side=224)
    offsets = boxes[:, :2] / torch.tensor([300 / 256, 512 / 256])
    assert offsets.round().min() == 0
    assert offsets.round().max() == 32
    assert (offsets.mean(0) - 16).abs().max() < 1
    assert torch.allclose(boxes[:, 2:], torch.tensor([224 * 300 / 256, 224 * 2.0]).double())
    middle = StretchedCrop(random=False).boxes(samples[:1], sizes[:1], seed=0, epoch=0, side=224)
    assert middle[0].tolist() == [16 * 300 / 256, 32.0, 224 * 300 / 256, 448.0]


def test_boxes_of_a_batch_are_those_of_its_samples():
    samples, sizes = torch.arange(50), torch.randint(20, 400, (50, 2))
    for crops in (RandomResizedCrop(), CenterCrop(), StretchedCrop(random=True)):
        together = crops.boxes(samples, sizes, seed=1, epoch=2, side=96)
        alone = [
            crops.boxes(samples[i : i + 1], sizes[i : i + 1], seed=1, epoch=2, side=96)
            for i in range(50)
        ]
        assert torch.equal(together, torch.cat(alone))


def test_sides_grow_in_steps_of_32():
    sides = [side_of_epoch(e, 16, 128, (0.25, 0.75), 224) for e in range(16)]
    assert sides == [128] * 7 + [160] * 3 + [192] * 2 + [224] * 4
    assert [side_of_epoch(e, 4, None, (0.25, 0.75), 224) for e in range(4)] == [224] * 4


def test_batches_come_in_the_side_that_is_asked_for(tmp_path):
    write_folder(tmp_path)
    for loader in ("torchvision", "synthetic"):
        split = load("folder", tmp_path, loader=loader, image_size=32).train
        batch = next(train_batches(split, batch_size=4, seed=0, epoch=0, side=20))
        assert batch.images.shape == (4, 20, 20, 3)
        assert next(train_batches(split, batch_size=4, seed=0, epoch=0)).images.shape[1] == 32


# Loaders -----------------------------------------------------------------------------------------


def test_synthetic_images_keep_order_and_labels(tmp_path):
    write_folder(tmp_path)
    real, made = (
        load("folder", tmp_path, loader=loader) for loader in ("torchvision", "synthetic")
    )
    options = {"batch_size": 4, "seed": 0, "epoch": 1}
    for a, b in zip(
        train_batches(real.train, **options), train_batches(made.train, **options), strict=True
    ):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.flip, b.flip)


def test_test_images_are_decoded_once(tmp_path, monkeypatch):
    write_folder(tmp_path)
    data = load("folder", tmp_path)
    first = list(test_batches(data.test, batch_size=3))
    decoded = []
    monkeypatch.setattr(type(data.test.decoding), "decode", lambda *a: decoded.append(a))
    for batch_size in (3, 5):
        again = list(test_batches(data.test, batch_size=batch_size))
        for name in ("images", "labels", "indices"):
            both = [torch.cat([getattr(b, name) for b in part]) for part in (first, again)]
            assert torch.equal(*both)
    assert decoded == []
    with pytest.raises(AttributeError):  # control: other samples are decoded
        list(test_batches(data.test, batch_size=3, shard=(0, 2)))
    assert len(decoded) == 1
    assert not hasattr(load("folder", tmp_path, keep_test=False).test, "decoding")


def test_too_many_test_images_are_not_kept(tmp_path, monkeypatch):
    from dfptkd.engine.data import file_data

    write_folder(tmp_path)
    monkeypatch.setattr(file_data, "available_bytes", lambda device: 8 * 24 * 24 * 3 * 4 - 1)
    data = load("folder", tmp_path)
    assert len(list(test_batches(data.test, batch_size=3))) == 3
    assert data.test.images is None


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"name": "cifar100", "loader": "dali"}, UsageError, "expected auto or device"),
        ({"name": "synthetic", "loader": "device"}, UsageError, "expected auto or synthetic"),
        ({"name": "cifar100", "start_size": 24, "image_size": 32}, UsageError, "image files"),
    ],
)
def test_loaders_that_do_not_apply(options, error, said):
    with pytest.raises(error, match=said):
        load_data(DataConfig(**options), CPU)


def test_images_that_do_not_fit_the_device(tmp_path, monkeypatch):
    from dfptkd.engine.data import file_data

    write_folder(tmp_path)
    monkeypatch.setattr(file_data, "available_bytes", lambda device: 1000)
    with pytest.raises(DataError, match=r"expected --data.loader dali or torchvision"):
        load("folder", tmp_path, loader="device")


def test_shards_share_each_batch_and_every_test_image(tmp_path):
    write_folder(tmp_path, train=7)
    data = load("folder", tmp_path)
    options = {"batch_size": 8, "seed": 0, "epoch": 0}
    whole = next(train_batches(data.train, **options))
    for ranks in (2, 4):
        parts = [next(train_batches(data.train, **options, shard=(r, ranks))) for r in range(ranks)]
        for name in ("images", "labels", "indices", "flip"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    for ranks in (1, 2, 3, 20):  # of 8 images: more ranks than images too
        seen = [
            b.indices
            for r in range(ranks)
            for b in test_batches(data.test, batch_size=3, shard=(r, ranks))
        ]
        assert torch.cat(seen).tolist() == list(range(8))
