"""A zoo of image folders, sound and damaged: verify-data and a run agree on every one of them."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from sample_images import encoded, picture

from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig
from dfptkd.engine.data import load_data, test_batches
from dfptkd.engine.data.quarantine import LIST_NAME
from dfptkd.engine.data.verify import looks_like
from dfptkd.engine.errors import DfptkdError

CPU = torch.device("cpu")
IDS = ("n01440764", "n01443537", "n15075141")
KAGGLE = "ILSVRC/Data/CLS-LOC"


def save(path, seed=0, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed, (16, 16)), kind))


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# Writers ------------------------------------------------------------------------------------------


def folder(root, classes=("ant", "bee"), splits=("train", "val"), file="{}.png"):
    """train/ and val/ of two images a class."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for i in range(2):
                save(root / split / name / file.format(i), 100 * s + 10 * c + i)


def imagenet(root, base="", train=IDS[:2], val=IDS[:2], flat=True):
    """Training folders, and validation images with a class each in turn."""
    folder(root / base, train, ("train",), "{}.JPEG")
    for i in range(6):
        label = val[i % len(val)]
        name = f"ILSVRC2012_val_0000000{i + 1}.JPEG"
        save(root / base / "val" / (name if flat else f"{label}/{name}"), 200 + i)
    return [f"ILSVRC2012_val_0000000{i + 1},{val[i % len(val)]} 1 2 3 4 " for i in range(6)]


def with_csv(root, base="", **options):
    rows = imagenet(root, base, **options)
    write(root / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)


def with_boxes(root):
    rows = imagenet(root, KAGGLE)
    for row in rows:
        image, label = row.split(" ")[0].split(",")
        boxes = f"<annotation><object><name>{label}</name></object></annotation>"
        write(root / "ILSVRC/Annotations/CLS-LOC/val" / f"{image}.xml", boxes)


def tiny(root, val="flat"):
    """Two classes of two training images, and four validation images: flat, sorted or inner."""
    base, ids = root / "tiny-imagenet-200", IDS[:2]
    write(base / "wnids.txt", *ids)
    rows = []
    for c, name in enumerate(ids):
        for i in range(2):
            save(base / "train" / name / "images" / f"{name}_{i}.JPEG", 10 * c + i)
            image = f"val_{2 * c + i}.JPEG"
            place = {"flat": "images", "sorted": name, "inner": f"{name}/images"}[val]
            save(base / "val" / place / image, 50 + 10 * c + i)
            rows.append(f"{image}\t{name}\t0\t0\t9\t9")
        write(base / "train" / name / f"{name}_boxes.txt", "a box")
    write(base / "val" / "val_annotations.txt", *rows)


def cub(root):
    base = root / "CUB_200_2011"
    names = [f"{c + 1:03}.Bird/{i}.jpg" for c in range(2) for i in range(4)]
    for i, name in enumerate(names):
        save(base / "images" / name, i)
    write(base / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    write(base / "train_test_split.txt", *(f"{i} {i % 2}" for i in range(1, 9)))
    write(base / "image_class_labels.txt", *(f"{i} {1 + (i > 4)}" for i in range(1, 9)))
    write(base / "classes.txt", "1 001.Bird", "2 002.Bird")


def shards(root, train=(0, 1), val=(0, 1), without=None):
    for split, labels in (("train", train), ("val", val)):
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for i, label in enumerate(labels):
                data = encoded(picture(100 * (split == "val") + i, (16, 16)), "PNG")
                for suffix, content in (("png", data), ("cls", str(label).encode())):
                    if (split, i, suffix) == without:
                        continue
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


# The zoo: how it is made, --data.name, what is done to it, exit code, what is said of it ----------


def edit(name, old, new):
    def change(root):
        path = root / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def remove(name):
    def change(root):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def rename(name, new):
    return lambda root: (root / name).rename(root / new)


def put(name, content=b"x"):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


def empty(name):
    def change(root):
        for path in (root / name).iterdir():
            path.unlink()

    return change


def add(name):
    return lambda root: save(root / name, 77)


def without_inner_folders(root):
    for inner in root.glob(f"{TINY}/train/*/images"):
        for path in inner.iterdir():
            path.rename(inner.parent / path.name)
        inner.rmdir()


def nothing(root):
    """A sound one."""


def pipe(name):
    return lambda root: os.mkfifo(root / name)


TINY, BIRDS = "tiny-imagenet-200", "CUB_200_2011"
ZOO = {
    "folder": (folder, "folder", nothing, 0, "16x16 pixels, cut as small"),
    "test in place of val": (
        lambda root: folder(root, splits=("train", "test")), "folder", nothing, 0,
        "train/ and test/: ",
    ),
    "val and test": (
        lambda root: folder(root, splits=("train", "val", "test")), "folder", nothing, 0,
        "train/ and val/ (test/ is not read)",
    ),
    "no val": (folder, "folder", remove("val"), 3, "neither val/ nor test/"),
    "no train": (folder, "folder", remove("train"), 3, "found no folder train/"),
    "renamed class": (
        folder, "folder", rename("val/bee", "val/wasp"), 3,
        "val: lacks 1 class that train/ has, first 'bee'",
    ),
    "class without training images": (
        folder, "folder", add("val/cat/1.png"), 3,
        "train: lacks 1 class that val/ has, first 'cat'",
    ),
    "empty class": (folder, "folder", empty("train/ant"), 3, "train/ant: no image"),
    "one class": (
        lambda root: folder(root, ("ant",)), "folder", nothing, 3, "found 1 class folders",
    ),
    "all images deeper": (
        lambda root: folder(root, file="images/{}.png"), "folder", nothing, 3,
        "no image right in it, but 2 deeper (train/ant/images/0.png)",
    ),
    "some images deeper": (
        folder, "folder", add("train/ant/more/9.png"), 0,
        "passed over: 1 image in a folder below that of its class (first: train/ant/more/9.png)",
    ),
    "other endings": (
        folder, "folder", put("train/bee/7.heic"), 0,
        "passed over: 1 file whose ending is not that of an image (first: train/bee/7.heic)",
    ),
    "beside the classes": (
        folder, "folder", add("train/stray.png"), 0,
        "passed over: 1 file beside the folders of the classes (first: train/stray.png)",
    ),
    "a system's files": (folder, "folder", put("train/ant/Thumbs.db"), 0, "train/ and val/"),
    "empty file": (folder, "folder", put("val/ant/0.png", b""), 3, "val/ant/0.png"),
    "text for an image": (folder, "folder", put("train/ant/1.png", b"404"), 3, "train/ant/1.png"),
    "pipe named as an image": (
        folder, "folder", pipe("train/ant/2.png"), 3, "train/ant/2.png: a pipe, a socket or a dev",
    ),
    "one name in two Unicode forms": (
        lambda root: folder(root, ("ant", "k\u00e4fer")), "folder",
        rename("val/k\u00e4fer", "val/ka\u0308fer"), 3,
        r"first 'käfer' = 'k\xe4fer', there written 'ka\u0308fer'",
    ),
    "imagenet, sorted": (
        lambda root: imagenet(root, flat=False), "imagenet", nothing, 0, "train/ and sorted val/",
    ),
    "imagenet, flat with a csv": (
        with_csv, "imagenet", nothing, 0, "flat val/ with labels of LOC_val_solution.csv",
    ),
    "imagenet, flat without labels": (imagenet, "imagenet", nothing, 3, "flat val/ without labels"),
    "imagenet, flat with other classes": (
        lambda root: with_csv(root, val=IDS), "imagenet", nothing, 0,
        "tested on 4 of 6 validation images: those of the 2 classes with training images, 1 have",
    ),
    "imagenet, sorted with other classes": (
        lambda root: imagenet(root, val=IDS, flat=False), "imagenet", nothing, 0,
        "tested on 4 of 6 validation images: those of the 2 classes with training images, 1 have",
    ),
    "imagenet, flat without a class": (
        lambda root: with_csv(root, train=IDS), "imagenet", nothing, 3,
        "val: lacks 1 class that train/ has, first 'n15075141'",
    ),
    "imagenet, sorted without a class": (
        lambda root: imagenet(root, train=IDS, flat=False), "imagenet", nothing, 3,
        "val: lacks 1 class that train/ has, first 'n15075141'",
    ),
    "imagenet, an image gone": (
        with_csv, "imagenet", remove("val/ILSVRC2012_val_00000003.JPEG"), 3,
        "found no ILSVRC2012_val_00000003, which LOC_val_solution.csv names",
    ),
    "imagenet, contradicting labels": (
        with_csv, "imagenet",
        lambda root: edit("LOC_val_solution.csv", "00000002", "00000001")(root), 3,
        "'ILSVRC2012_val_00000001' is there twice, with class",
    ),
    "imagenet, half sorted": (
        lambda root: imagenet(root, flat=False), "imagenet",
        rename(f"val/{IDS[0]}/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000001.JPEG"), 3,
        "ILSVRC2012_val_00000001.JPEG: beside class folders",
    ),
    "Kaggle": (
        lambda root: with_csv(root, KAGGLE), "imagenet", nothing, 0,
        "flat val/ with labels of LOC_val_solution.csv",
    ),
    "Kaggle without its csv": (
        with_boxes, "imagenet", nothing, 0, "with labels of Annotations/CLS-LOC/val",
    ),
    "Kaggle without labels": (
        with_boxes, "imagenet", remove("ILSVRC/Annotations"), 3, "flat val/ without labels",
    ),
    "tiny": (tiny, "tiny_imagenet", nothing, 0, "val/images/ by val/val_annotations.txt"),
    "tiny, sorted": (
        lambda root: tiny(root, "sorted"), "tiny_imagenet", nothing, 0, "val/ sorted by class",
    ),
    "tiny, sorted with images/": (
        lambda root: tiny(root, "inner"), "tiny_imagenet", nothing, 0, "val/ sorted by class",
    ),
    "tiny, sorted without annotations": (
        lambda root: tiny(root, "inner"), "tiny_imagenet",
        remove(f"{TINY}/val/val_annotations.txt"), 0, "val/ sorted by class",
    ),
    "tiny, without images/ in train": (
        tiny, "tiny_imagenet",
        without_inner_folders, 0, "val/images/ by",
    ),
    "tiny, sorted wrongly": (
        lambda root: tiny(root, "sorted"), "tiny_imagenet",
        rename(f"{TINY}/val/{IDS[0]}/val_0.JPEG", f"{TINY}/val/{IDS[1]}/val_0.JPEG"), 3,
        f"val_annotations.txt does not say that it is of class '{IDS[1]}'",
    ),
    "tiny, no wnids": (tiny, "tiny_imagenet", remove(f"{TINY}/wnids.txt"), 3, "found no wnids.txt"),
    "tiny, no annotations": (
        tiny, "tiny_imagenet", remove(f"{TINY}/val/val_annotations.txt"), 3,
        "val_annotations.txt: cannot be read",
    ),
    "tiny, class gone": (
        tiny, "tiny_imagenet", rename(f"{TINY}/train/{IDS[1]}", f"{TINY}/train/fish"), 3,
        f"lacks 1 class that wnids.txt names, first '{IDS[1]}'",
    ),
    "tiny, image without annotation": (
        tiny, "tiny_imagenet", add(f"{TINY}/val/images/val_9.JPEG"), 3,
        "val_9.JPEG: val_annotations.txt has no class for it",
    ),
    "tiny, annotation without image": (
        tiny, "tiny_imagenet", remove(f"{TINY}/val/images/val_1.JPEG"), 3,
        "val_1.JPEG: no such file, but val_annotations.txt names it",
    ),
    "tiny, contradicting annotations": (
        tiny, "tiny_imagenet", edit(f"{TINY}/val/val_annotations.txt", "val_1", "val_2"), 3,
        "'val_2.JPEG' is there twice",
    ),
    "birds": (cub, "cub200", nothing, 0, "images/ by the official split"),
    "birds, a file gone": (
        cub, "cub200", remove(f"{BIRDS}/images/002.Bird/3.jpg"), 3,
        "3.jpg: no such file, but images.txt names it",
    ),
    "birds, a table gone": (cub, "cub200", remove(f"{BIRDS}/classes.txt"), 3, "no classes.txt"),
    "birds, a file too many": (
        cub, "cub200", add(f"{BIRDS}/images/002.Bird/9.jpg"), 0,
        "passed over: 1 file that images.txt does not name",
    ),
    "shards": (shards, "webdataset", nothing, 0, "train-*.tar and val-*.tar"),
    "shards, class without training images": (
        lambda root: shards(root, val=(0, 2)), "webdataset", nothing, 3,
        "test images and no training image of 1 of 3 classes, first '2'",
    ),
    "shards, label without image": (
        lambda root: shards(root, train=(0, 1, 1), without=("train", 2, "png")), "webdataset",
        nothing, 0, "passed over: 1 label without an image that is read (first: train-0.tar/2.cls)",
    ),
    "shards, image without label": (
        lambda root: shards(root, without=("train", 1, "cls")), "webdataset", nothing, 3,
        "1.png: no .cls beside it",
    ),
    "shards, damaged": (
        shards, "webdataset", put("train-0.tar", b"no tar" * 200), 3, "an uncompressed tar file",
    ),
}  # fmt: skip


def run_reads(root, name):
    """Exit code of a run that looks at each image once, and what it says."""
    config = DataConfig(
        name=name, root=str(root), loader="torchvision", image_size=16, workers=0, keep_test=False
    )
    try:
        data = load_data(config, CPU)
        for split in (data.train, data.test):
            for _ in test_batches(split, batch_size=64):
                pass
    except DfptkdError as error:
        return error.exit_code, str(error)
    return 0, "\n".join([data.preprocessing["in_words"], *data.passed_over])


@pytest.mark.parametrize("case", ZOO)
def test_verify_data_and_a_run_agree(case, tmp_path, capsys):
    make, name, change, code, said = ZOO[case]
    if name == "imagenet":
        pytest.importorskip("timm")  # the numbers of ImageNet's classes
    root = tmp_path / "data"
    make(root)
    change(root)
    found, words = run_reads(root, name)
    assert (found, said in words) == (code, True), words
    assert "\n" not in words or code == 0
    assert looks_like(root) == name
    assert main(["verify-data", str(root), "--workers", "1", "--out", f"{tmp_path}/list"]) == code
    printed = capsys.readouterr().out
    assert said in printed
    assert f"--data.name {name}" in printed


def test_a_word_for_every_kind_of_double(tmp_path, capsys):
    folder(tmp_path)
    for old, new in (
        ("train/ant/0", "train/ant/8"),
        ("train/ant/1", "train/bee/9"),
        ("train/bee/0", "val/bee/9"),
    ):
        shutil.copyfile(tmp_path / f"{old}.png", tmp_path / f"{new}.png")
    assert main(["verify-data", str(tmp_path), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "1 image is there twice within a class (first: train/ant/8.png = train/ant/0.png)",
        "1 image is there twice in two classes (first: train/bee/9.png = train/ant/1.png)",
        "1 image is there twice in both splits (first: val/bee/9.png = train/bee/0.png)",
    ):
        assert line in printed


def test_the_images_of_an_odd_layout_are_the_right_ones(tmp_path):
    """Labels and files of each class, against the names that the writers gave them."""
    pytest.importorskip("timm")
    with_csv(tmp_path / "kaggle", KAGGLE, val=IDS)
    tiny(tmp_path / "flat")
    tiny(tmp_path / "sorted", "inner")

    def loaded(name, root):
        config = DataConfig(name=name, root=str(root), loader="torchvision", keep_test=False)
        return load_data(config, CPU)

    data = loaded("imagenet", tmp_path / "kaggle")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    names = [Path(data.test.files.name(i)).name for i in range(4)]
    assert names == [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 4, 5)]
    assert data.test.files.name(0).startswith(f"{KAGGLE}/val/")
    # the folder that holds train/ serves as the root too, with the labels where Kaggle puts them
    for inner in (KAGGLE, "ILSVRC"):
        assert loaded("imagenet", tmp_path / "kaggle" / inner).identity == data.identity
    flat, in_folders = (loaded("tiny_imagenet", tmp_path / n) for n in ("flat", "sorted"))
    assert flat.identity == in_folders.identity
    assert in_folders.test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("written_for", ["root", "inner", "elsewhere", "above"])
def test_a_list_is_found_from_the_root_and_from_the_folder_in_it(written_for, tmp_path, capsys):
    root = tmp_path / "data"
    tiny(root)
    put(f"{TINY}/train/{IDS[0]}/images/{IDS[0]}_1.JPEG", b"")(root)
    verified = {"above": root, "root": root}.get(written_for, root / TINY)
    options = ["--out", str(tmp_path / "list.json")] if written_for == "elsewhere" else []
    assert main(["verify-data", str(verified), "--workers", "1", *options]) == 3
    if written_for != "elsewhere":
        assert (verified / LIST_NAME).is_file()
    config = DataConfig(
        name="tiny_imagenet", root=str(root / TINY if written_for == "above" else root),
        loader="torchvision", max_quarantined=0.5, image_size=16,
        quarantine=str(tmp_path / "list.json") if written_for == "elsewhere" else None,
    )  # fmt: skip
    data = load_data(config, CPU)
    assert data.train.listed.tolist() == [False, True, False, False]


def test_a_list_above_the_root_that_is_not_of_its_images_is_none(tmp_path):
    folder(tmp_path / "data")
    config = DataConfig(name="folder", root=str(tmp_path / "data"), image_size=16)
    for text in ("no list", json.dumps(
        {"format": "dfptkd.quarantine/1", "checked": 1, "images": {"others/train/ant/0.png": "x"}}
    )):  # fmt: skip
        (tmp_path / LIST_NAME).write_text(text)
        assert load_data(config, CPU).train.listed is None


def test_who_takes_the_place_of_a_listed_image(tmp_path):
    folder(tmp_path)
    put("train/ant/0.png", b"")(tmp_path)

    def note():
        assert main(["verify-data", str(tmp_path), "--workers", "1"]) == 3
        config = DataConfig(name="folder", root=str(tmp_path), image_size=16, max_quarantined=0.9)
        (line,) = load_data(config, CPU).notes
        return line.partition("): ")[2]

    assert note() == "others of their class take their places"
    put("train/ant/1.png", b"")(tmp_path)
    assert note() == (
        "1 class has no sound image left (first 'ant'); images of other classes take their places"
    )


def test_a_message_names_the_file_and_no_buffer(tmp_path):
    folder(tmp_path)
    put("val/bee/1.png", b"no image")(tmp_path)
    code, said = run_reads(tmp_path, "folder")
    assert code == 3
    assert said.startswith(f"{tmp_path}/val/bee/1.png: cannot be decoded as an image (")
    assert "BytesIO" not in said
