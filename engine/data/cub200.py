"""Caltech-UCSD Birds 200-2011 in its official layout: 5,994 training and 5,794 test photographs.

CUB_200_2011/images/<class>/<image>     images.txt               <image id> <path below images/>
                                        train_test_split.txt     <image id> <1: training>
                                        image_class_labels.txt   <image id> <class id from 1>
                                        classes.txt              <class id> <name>
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .image_files import (
    FileSet,
    FolderFiles,
    PassedOver,
    check_files_exist,
    list_folder,
    read_lines,
)
from .source import find_root

_FILES = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
_LAYOUT = f"CUB_200_2011/ with images/, {', '.join(_FILES)}"


def find_cub200(config: DataConfig) -> FileSet:
    """The photographs and the official split.

    Raises:
        DataError: A file is missing, or the tables contradict each other or the files.
    """
    root = find_root(config.root, _LAYOUT)
    folder = "CUB_200_2011/" if (root / "CUB_200_2011").is_dir() else ""
    missing = [name for name in _FILES if not (root / folder / name).is_file()]
    if missing:
        raise DataError(f"{root / folder}: found no {missing[0]}, expected {_LAYOUT}")
    paths, training, labels, names = (_table(root / folder / name) for name in _FILES)
    for name, table in zip(_FILES[1:3], (training, labels), strict=True):
        if table.keys() != paths.keys():
            odd = sorted(table.keys() ^ paths.keys())[0]
            raise DataError(
                f"{root / folder / name}: image {odd} is in it or in images.txt, but not in both"
            )
    twice = [path for path, count in Counter(paths.values()).items() if count > 1]
    if twice:
        raise DataError(f"{root / folder / 'images.txt'}: {twice[0]!r} is there twice")
    classes = _classes(root / folder / "classes.txt", names)
    splits = []
    for wanted in ("1", "0"):
        chosen = sorted(i for i in paths if training[i] == wanted)
        if not chosen:
            raise DataError(
                f"{root / folder / 'train_test_split.txt'}: no image is marked {wanted}, expected "
                "1 for training images and 0 for test images"
            )
        splits.append(_files(root, folder, chosen, paths, labels, classes))
    return FileSet(
        root,
        *splits,
        class_names=list(classes.values()),
        folder=folder.rstrip("/"),
        layout="images/ by the official split",
        passed_over=_passed_over(root, folder, set(paths.values())),
    )


def _passed_over(root: Path, folder: str, named: set[str]) -> list[str]:
    """A line for the files below images/ that images.txt does not name."""
    passed = PassedOver(root)
    for entry in list_folder(root / folder / "images"):
        below = list_folder(Path(entry)) if entry.is_dir() else [None]
        for file in below:
            name = entry.name if file is None else f"{entry.name}/{file.name}"
            if name not in named:
                passed.add("file", "that images.txt does not name", f"{folder}images/{name}")
    return passed.lines()


def _files(
    root: Path,
    folder: str,
    chosen: list[int],
    paths: dict[int, str],
    labels: dict[int, str],
    classes: dict[str, str],
) -> FolderFiles:
    position = {number: i for i, number in enumerate(classes)}
    for image in chosen:
        if labels[image] not in position:
            raise DataError(
                f"{root / folder / 'image_class_labels.txt'}: image {image} has class "
                f"{labels[image]!r}, expected one of classes.txt"
            )
    found = [os.fsencode(f"{folder}images/{paths[i]}") for i in chosen]
    check_files_exist(root, found, root / folder / "images.txt")
    return FolderFiles(root, np.array(found), torch.tensor([position[labels[i]] for i in chosen]))


def _table(path: Path) -> dict[int, str]:
    """Number -> the rest of its line."""
    table: dict[int, str] = {}
    for line in read_lines(path):
        number, _, value = line.strip().partition(" ")
        if not (number.isascii() and number.isdigit() and value) or int(number) in table:
            raise DataError(f"{path}: line {line[:80]!r}, expected a number of its own and a value")
        table[int(number)] = value
    return table


def _classes(path: Path, names: dict[int, str]) -> dict[str, str]:
    """Class number as text -> name, in the order of the numbers."""
    if len(names) < 2:
        raise DataError(f"{path}: found {len(names)} classes, expected at least 2")
    return {str(number): names[number] for number in sorted(names)}
