"""ImageNet-1k (ILSVRC 2012): train/<WordNet id>/*.JPEG, and validation images in one of these forms

    val/<WordNet id>/*.JPEG                 sorted into classes by the usual script
    val/ILSVRC2012_val_00000001.JPEG ...    flat, as published, with labels from
        ILSVRC2012_devkit_t12/ or ILSVRC2012_devkit_t12.tar.gz (official), or LOC_val_solution.csv

A class is the place of its WordNet id among the 1000 sorted ones, the order of all published
networks; a folder with fewer classes keeps those numbers.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError, UsageError
from .folder import check_same_classes, class_names, split_folders
from .image_files import (
    FileSet,
    FolderFiles,
    class_folders,
    list_folder,
    list_images,
    read_lines,
)
from .source import find_root, read_bytes

NUM_CLASSES = 1000
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_CSV = "LOC_val_solution.csv"
_LAYOUT = (
    "train/<WordNet id>/ and val/<WordNet id>/, or flat val/ILSVRC2012_val_*.JPEG beside "
    f"{_DEVKIT}/ (or its .tar.gz, or {_CSV})"
)


def find_imagenet(config: DataConfig) -> FileSet:
    """The images of both splits, classes numbered as in every published network.

    Raises:
        DataError: A folder, class, label or image is missing or not ImageNet's.
        UsageError: A package that the official labels need is missing.
    """
    root = find_root(config.root, _LAYOUT)
    train_folder, val_folder = split_folders(root)
    found = class_names(train_folder)
    odd = [name for name in found if not re.fullmatch(r"n\d{8}", name)]
    if odd:
        raise DataError(
            f"{train_folder / odd[0]}: no WordNet id, expected folders like n01440764 (--data.name "
            "folder takes any names)"
        )
    names = _all_classes(train_folder, found)
    train = _by_class(root, train_folder, found, names)
    if any(entry.is_dir() for entry in list_folder(val_folder)):
        val_found = class_names(val_folder)
        check_same_classes(train_folder, found, val_folder, val_found)
        return FileSet(root, train, _by_class(root, val_folder, val_found, names), names)
    return FileSet(root, train, _flat(root, val_folder, names), names)


def _all_classes(train_folder: Path, found: list[str]) -> list[str]:
    if len(found) == NUM_CLASSES:
        return found
    from ..models.external import imagenet_wordnet_ids

    names = imagenet_wordnet_ids()
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{train_folder / unknown[0]}: none of ImageNet's 1000 classes (--data.name folder "
            "takes any)"
        )
    return names


def _by_class(root: Path, folder: Path, found: list[str], names: list[str]) -> FolderFiles:
    position = {name: i for i, name in enumerate(names)}
    labels = [position[name] for name in found]
    return class_folders(root, [f"{folder.name}/{name}" for name in found], labels)


def _flat(root: Path, folder: Path, names: list[str]) -> FolderFiles:
    """The validation images of a flat folder, in the order of their numbers."""
    images = list_images(root, folder.name)
    position = {name: i for i, name in enumerate(names)}
    truth = _labels_by_image(root, images)
    labels = []
    for image in images:
        label = truth.get(Path(os.fsdecode(image)).stem)
        if label not in position:
            raise DataError(f"{root / os.fsdecode(image)}: no label for it, expected {_LAYOUT}")
        labels.append(position[label])
    return FolderFiles(root, np.array(images), torch.tensor(labels))


def _labels_by_image(root: Path, images: Sequence[bytes]) -> dict[str, str]:
    """Image name without suffix -> WordNet id."""
    if (root / _CSV).is_file():
        rows = [line.split(",") for line in read_lines(root / _CSV)[1:]]
        return {row[0]: row[1].split(" ")[0] for row in rows if len(row) > 1}
    truth, ids = _devkit(root)
    if len(truth) != len(images):
        raise DataError(
            f"{root}: {len(images)} validation images, but the devkit has {len(truth)} labels: "
            f"expected {_LAYOUT}"
        )
    stems = [Path(os.fsdecode(image)).stem for image in images]  # sorted: in the devkit's order
    unknown = [number for number in truth if number not in ids]
    if unknown:
        raise DataError(f"{root / _DEVKIT}: class {unknown[0]} is not in meta.mat")
    return {stem: ids[number] for stem, number in zip(stems, truth, strict=True)}


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
            f"{path} needs the package scipy: expected pip install scipy, or {_CSV} beside val/"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # a damaged MATLAB file can raise anything
        raise DataError(f"{path}: expected the devkit's meta.mat ({error})") from error
