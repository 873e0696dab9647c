"""Tiny-ImageNet-200: 100,000 training and 10,000 validation images, 64x64.

tiny-imagenet-200/wnids.txt                         a WordNet id a line
                  train/<id>/images/<image>.JPEG    or train/<id>/<image>.JPEG
                  val/images/<image>.JPEG           val/val_annotations.txt   <image> <id> <box>

or, as the usual scripts sort it, val/<id>/images/<image>.JPEG or val/<id>/<image>.JPEG.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .folder import check_classes, class_names
from .image_files import (
    FileSet,
    FolderFiles,
    PassedOver,
    check_files_exist,
    class_folders,
    is_image_name,
    list_folder,
    list_images,
    read_lines,
)
from .source import find_root

WNIDS = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"
INNER = "tiny-imagenet-200"
_LAYOUT = (
    f"{INNER}/ with {WNIDS}, train/<id>/images/ and either {ANNOTATIONS} with val/images/ "
    "or val/<id>/"
)


def find_tiny_imagenet(config: DataConfig) -> FileSet:
    """The images; classes are the WordNet ids, sorted.

    Raises:
        DataError: A file or class is missing, or the annotations contradict themselves or files.
    """
    root = find_root(config.root, _LAYOUT)
    folder = f"{INNER}/" if (root / INNER).is_dir() else ""
    if not (root / folder / WNIDS).is_file():
        raise DataError(f"{root / folder}: found no {WNIDS}, expected {_LAYOUT}")
    names = sorted({line.strip() for line in read_lines(root / folder / WNIDS)})
    if len(names) < 2:
        raise DataError(f"{root / folder / WNIDS}: {len(names)} classes, expected at least 2")
    passed = PassedOver(root)
    train = _sorted_split(root, f"{folder}train", names, passed)
    if _has_images(root / folder / "val" / "images"):
        test, words = _annotated(root, folder, names, passed), f"val/images/ by {ANNOTATIONS}"
    else:
        test, words = _sorted_split(root, f"{folder}val", names, passed), "val/ sorted by class"
        _check_annotations(root, folder, names, test)
    return FileSet(
        root,
        train,
        test,
        class_names=names,
        folder=folder.rstrip("/"),
        layout=f"train/ and {words}",
        passed_over=passed.lines(),
    )


def _sorted_split(root: Path, split: str, names: list[str], passed: PassedOver) -> FolderFiles:
    """The images of a split that has a folder for each class."""
    if not (root / split).is_dir():
        raise DataError(f"{root / split}: no such folder, expected {_LAYOUT}")
    there = class_names(root, split, passed)
    check_classes(root / split, names, there, f"{WNIDS} names")
    for name in sorted(set(there) - set(names)):
        passed.add("class folder", f"that {WNIDS} does not name", f"{split}/{name}")
    inner = [f"{split}/{name}/images" for name in names]
    folders = [path if (root / path).is_dir() else path.rpartition("/")[0] for path in inner]
    return class_folders(root, folders, range(len(names)), passed)


def _annotated(root: Path, folder: str, names: list[str], passed: PassedOver) -> FolderFiles:
    """The validation images as published, in one folder with a table of their classes."""
    path = root / folder / ANNOTATIONS
    labels = _read_annotations(path, names)
    there = {os.fsdecode(name).rpartition("/")[2]
             for name in list_images(root, f"{folder}val/images", passed)}  # fmt: skip
    for entry in list_folder(root / folder / "val"):
        if entry.is_dir() and entry.name != "images":
            passed.add_folder(f"{folder}val/{entry.name}")
    images = sorted(labels)
    found = np.array([os.fsencode(f"{folder}val/images/{image}") for image in images])
    check_files_exist(root, found.tolist(), path)
    unknown = sorted(there - labels.keys())
    if unknown:
        raise DataError(
            f"{root / folder / 'val/images' / unknown[0]}: {path.name} has no class for it"
            + (f" and {len(unknown) - 1:,} others" if len(unknown) > 1 else "")
        )
    return FolderFiles(root, found, torch.tensor([labels[image] for image in images]))


def _read_annotations(path: Path, names: list[str]) -> dict[str, int]:
    """The class of each image.

    Raises:
        DataError: There is no image, one of an unknown class, or one that is there twice.
    """
    position = {name: i for i, name in enumerate(names)}
    found: dict[str, int] = {}
    for line in read_lines(path):
        image, _, rest = line.partition("\t")
        label = rest.split("\t")[0].strip()
        if label not in position:
            raise DataError(
                f"{path}: {image!r} has class {label!r}, expected <image> tab <id of {WNIDS}>"
            )
        if image in found:
            also = names[found[image]]
            raise DataError(f"{path}: {image!r} is there twice, with class {also!r} and {label!r}")
        found[image] = position[label]
    if not found:
        raise DataError(f"{path}: no image, expected {_LAYOUT}")
    return found


def _check_annotations(root: Path, folder: str, names: list[str], test: FolderFiles) -> None:
    """Compare sorted validation images with the table that they were sorted by, if it is there.

    Raises:
        DataError: It says otherwise of an image, or names one that is not there.
    """
    path = root / folder / ANNOTATIONS
    if not path.is_file():
        return
    labels = _read_annotations(path, names)
    for sample, label in enumerate(test.labels.tolist()):
        image = test.name(sample).rpartition("/")[2]
        if labels.pop(image, None) != label:
            raise DataError(
                f"{test.where(sample)}: {path.name} does not say that it is of class "
                f"{names[label]!r}"
            )
    if labels:
        raise DataError(
            f"{path}: names {min(labels)!r}"
            + (f" and {len(labels) - 1:,} others" if len(labels) > 1 else "")
            + ", which no class folder has"
        )


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(is_image_name(entry.name) for entry in list_folder(folder))
