"""ImageNet-1k (ILSVRC 2012): train/<WordNet id>/*.JPEG, and validation images in one of these forms

    val/<WordNet id>/*.JPEG                 sorted into classes by the usual script
    val/ILSVRC2012_val_00000001.JPEG ...    flat, as published, with labels from
        ILSVRC2012_devkit_t12/ or ILSVRC2012_devkit_t12.tar.gz (official), LOC_val_solution.csv, or
        Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml ... (Kaggle)

beside train/ or, as Kaggle has it, below ILSVRC/Data/CLS-LOC/ with the labels beside ILSVRC/ and in
it. A class is the place of its WordNet id among the 1000 sorted ones, the order of all published
networks; a folder with fewer classes keeps those numbers, and is tested on their images alone.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError, UsageError
from .folder import check_classes, class_names, split_folders
from .image_files import (
    FileSet,
    FolderFiles,
    PassedOver,
    class_folders,
    is_image_name,
    list_folder,
    list_images,
    read_lines,
)
from .source import find_root, read_bytes

NUM_CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")
KAGGLE = ("ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/")
_IMAGE_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
CSV = "LOC_val_solution.csv"
_BOXES = "Annotations/CLS-LOC/val"
_LAYOUT = (
    "train/<WordNet id>/ and val/<WordNet id>/, or flat val/ILSVRC2012_val_*.JPEG beside "
    f"{_DEVKIT}/ (or its .tar.gz, or {CSV})"
)


def find_imagenet(config: DataConfig) -> FileSet:
    """The images of both splits, classes numbered as in every published network.

    Of the validation images those of classes that are trained.

    Raises:
        DataError: A folder, class, label or image is missing or not ImageNet's.
        UsageError: A package that the official labels need is missing.
    """
    root = find_root(config.root, _LAYOUT)
    folder = data_folder(root)
    train_folder, val_folder = split_folders(root, folder, _LAYOUT)
    passed = PassedOver(root)
    found = class_names(root, train_folder, passed)
    odd = [name for name in found if not WORDNET_ID.fullmatch(name)]
    if odd:
        raise DataError(
            f"{root / train_folder / odd[0]}: no WordNet id, expected folders like n01440764 "
            "(--data.name folder takes any names)"
        )
    names = _all_classes(root / train_folder, found)
    train = _by_class(root, train_folder, found, names, passed)
    entries = list_folder(root / val_folder)
    if any(entry.is_dir() for entry in entries):
        flat = [entry.name for entry in entries if is_image_name(entry.name)]
        if flat:
            raise DataError(
                f"{root / val_folder / flat[0]}: beside class folders ({len(flat):,} in all), "
                "expected all images flat or all sorted"
            )
        there = class_names(root, val_folder, passed)
        unknown = sorted(set(there) - set(names))
        if unknown:
            raise DataError(
                f"{root / val_folder / unknown[0]}: none of the classes of {train_folder}/ or of "
                "ImageNet's"
            )
        val, words = _by_class(root, val_folder, there, names, passed), "sorted val/"
    else:
        val, words = _flat(root, val_folder, names, found, passed)
    tested = [names[label] for label in val.labels.unique().tolist()]
    check_classes(root / val_folder, found, tested, f"{train_folder}/ has")
    trained = torch.isin(val.labels, train.labels.unique())
    if not trained.all():
        passed.note(
            f"tested on {int(trained.sum()):,} of {len(val):,} validation images: those of the "
            f"{len(found):,} classes with training images, {len(tested) - len(found):,} have none"
        )
        val = val.take(trained.nonzero()[:, 0])
    return FileSet(
        root,
        train,
        val,
        class_names=names,
        folder=folder.rstrip("/"),
        layout=f"train/ and {words}",
        passed_over=passed.lines(),
    )


def data_folder(root: Path) -> str:
    """Where train/ lies below `root`, "" or with a slash at its end."""
    kaggle = (folder for folder in KAGGLE if (root / folder / "train").is_dir())
    return "" if (root / "train").is_dir() else next(kaggle, "")


def are_classes(found: Collection[str]) -> bool:
    """Whether these WordNet ids are ImageNet's, as far as it is known here."""
    if len(found) == NUM_CLASSES:
        return True
    try:
        return set(found) <= set(_published_ids())
    except UsageError:  # the package that has the list is missing: no run could number them
        return False


@functools.cache
def _published_ids() -> tuple[str, ...]:
    from ..models.external import imagenet_wordnet_ids

    return tuple(imagenet_wordnet_ids())


def _all_classes(train_folder: Path, found: list[str]) -> list[str]:
    if len(found) == NUM_CLASSES:
        return found
    names = list(_published_ids())
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{train_folder / unknown[0]}: none of ImageNet's 1000 classes (--data.name folder "
            "takes any)"
        )
    return names


def _by_class(
    root: Path, folder: str, found: list[str], names: list[str], passed: PassedOver
) -> FolderFiles:
    position = {name: i for i, name in enumerate(names)}
    labels = [position[name] for name in found]
    return class_folders(root, [f"{folder}/{name}" for name in found], labels, passed)


# Flat validation images ---------------------------------------------------------------------------


def _flat(
    root: Path, folder: str, names: list[str], trained: list[str], passed: PassedOver
) -> tuple[FolderFiles, str]:
    """The validation images of a flat folder, in the order of their numbers, and where their labels
    are from.

    Raises:
        DataError: An image without label, or a labelled one of a trained class that is not there.
    """
    images = list_images(root, folder, passed)
    stems = [Path(os.fsdecode(image)).stem for image in images]
    position = {name: i for i, name in enumerate(names)}
    truth, source = _labels_by_image(root / folder, stems)
    labels = []
    for image, stem in zip(images, stems, strict=True):
        label = truth.get(stem)
        if label not in position:
            raise DataError(
                f"{root / os.fsdecode(image)}: no label for it in {source}, expected {_LAYOUT}"
            )
        labels.append(position[label])
    wanted = {stem for stem, label in truth.items() if label in set(trained)}
    missing = sorted(wanted - set(stems))
    if missing:
        raise DataError(
            f"{root / folder}: found no {missing[0]}, which {source} names"
            + (f" ({len(missing):,} images are missing)" if len(missing) > 1 else "")
        )
    files = FolderFiles(root, np.array(images), torch.tensor(labels))
    return files, f"flat val/ with labels of {source}"


def _labels_by_image(val_folder: Path, stems: Sequence[str]) -> tuple[dict[str, str], str]:
    """Image name without suffix -> WordNet id, and the name of the file that says so."""
    base = Path(os.path.abspath(val_folder.parent))
    places = [base]
    if base.parts[-2:] == ("Data", "CLS-LOC"):
        places += base.parents[1:3]  # ILSVRC/, and what Kaggle's archive unpacks to
    for place in places:
        if (place / CSV).is_file():
            return _read_csv(place / CSV), CSV
    for place in places:
        if (place / _DEVKIT).is_dir() or (place / f"{_DEVKIT}.tar.gz").is_file():
            return _by_devkit(place, stems), _DEVKIT
    for place in places:
        if (place / _BOXES).is_dir():
            return {stem: _class_of_boxes(place / _BOXES / f"{stem}.xml") for stem in stems}, _BOXES
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"{val_folder.parent}: flat val/ without labels (looked in {looked}), expected {_LAYOUT}"
    )


def _read_csv(path: Path) -> dict[str, str]:
    labels: dict[str, str] = {}
    for line in read_lines(path)[1:]:
        image, _, boxes = line.partition(",")
        label = boxes.strip('"').split(" ")[0]
        if not label.startswith("n"):
            raise DataError(f"{path}: line {line[:80]!r}, expected <image>,<WordNet id> <box>")
        if labels.setdefault(image, label) != label:
            raise DataError(
                f"{path}: {image!r} is there twice, with class {labels[image]!r} and {label!r}"
            )
    return labels


def _class_of_boxes(path: Path) -> str:
    """The class of an image by its bounding boxes, which are all of one class."""
    found = set(re.findall(rb"<name>\s*(n\d{8})\s*</name>", read_bytes(path)))
    if len(found) != 1:
        raise DataError(f"{path}: names {len(found)} classes, expected one")
    return found.pop().decode()


def _by_devkit(place: Path, stems: Sequence[str]) -> dict[str, str]:
    """By the numbers in the images' names or, of other names, by their order."""
    truth, ids = _devkit(place)
    unknown = [number for number in truth if number not in ids]
    if unknown:
        raise DataError(f"{place / _DEVKIT}: class {unknown[0]} is not in meta.mat")
    matches = [_IMAGE_NAME.fullmatch(stem) for stem in stems]
    if all(matches):
        numbered = {f"ILSVRC2012_val_{i:08}": ids[number] for i, number in enumerate(truth, 1)}
        if numbered.keys() >= set(stems):
            return numbered
    elif len(truth) == len(stems):
        return {stem: ids[number] for stem, number in zip(stems, truth, strict=True)}
    raise DataError(
        f"{place}: {len(stems)} validation images, but the devkit has {len(truth)} labels: "
        f"expected {_LAYOUT}"
    )


def _devkit(root: Path) -> tuple[list[int], dict[int, str]]:
    """The class number of each validation image, and the WordNet id of each class number."""
    archive = root / f"{_DEVKIT}.tar.gz"
    if (root / _DEVKIT).is_dir():
        read = {name: read_bytes(root / _DEVKIT / name) for name in (_TRUTH, "data/meta.mat")}
    elif archive.is_file():
        read = _from_archive(archive)
    else:
        raise DataError(f"{root}: flat val/ without labels, expected {_LAYOUT}")
    try:
        truth = [int(line) for line in read[_TRUTH].split()]
    except ValueError:
        raise DataError(f"{root / _DEVKIT / _TRUTH}: expected a class number a line") from None
    return truth, _wordnet_ids(read["data/meta.mat"], root / _DEVKIT / "data/meta.mat")


def _from_archive(archive: Path) -> dict[str, bytes]:
    read = {}
    try:
        with tarfile.open(archive) as tar:
            for name in (_TRUTH, "data/meta.mat"):
                file = tar.extractfile(f"{_DEVKIT}/{name}")
                read[name] = file.read() if file else b""
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive}: expected the official devkit ({error})") from error
    return read


def _wordnet_ids(data: bytes, path: Path) -> dict[int, str]:
    """ILSVRC's class numbers and their WordNet ids, out of meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UsageError(
            f"{path} needs the package scipy: expected pip install scipy, or {CSV} beside val/"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # a damaged MATLAB file can raise anything
        raise DataError(f"{path}: expected the devkit's meta.mat ({error})") from error
