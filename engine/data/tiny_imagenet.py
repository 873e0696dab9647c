"""Tiny-ImageNet-200 in its official layout: 100,000 training and 10,000 validation images, 64x64.

tiny-imagenet-200/wnids.txt                         a WordNet id a line
                  train/<id>/images/<image>.JPEG
                  val/images/<image>.JPEG           val/val_annotations.txt   <image> <id> <box>
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .image_files import FileSet, FolderFiles, class_folders, read_lines
from .source import find_root

_LAYOUT = "tiny-imagenet-200/ with wnids.txt, train/<id>/images/ and val/val_annotations.txt"


def find_tiny_imagenet(config: DataConfig) -> FileSet:
    """The images; classes are the WordNet ids, sorted.

    Raises:
        DataError: A file or class is missing, or a label is unknown.
    """
    root = find_root(config.root, _LAYOUT)
    folder = "tiny-imagenet-200/" if (root / "tiny-imagenet-200").is_dir() else ""
    if not (root / folder / "wnids.txt").is_file():
        raise DataError(f"{root / folder}: found no wnids.txt, expected {_LAYOUT}")
    names = sorted({line.strip() for line in read_lines(root / folder / "wnids.txt")})
    if len(names) < 2:
        raise DataError(f"{root / folder / 'wnids.txt'}: {len(names)} classes, expected at least 2")
    folders = [f"{folder}train/{name}/images" for name in names]
    train = class_folders(root, folders, range(len(names)))
    return FileSet(root, train, _validation(root, folder, names), names)


def _validation(root: Path, folder: str, names: list[str]) -> FolderFiles:
    path = root / folder / "val" / "val_annotations.txt"
    position = {name: i for i, name in enumerate(names)}
    found = []
    for line in read_lines(path):
        image, _, rest = line.partition("\t")
        label = rest.split("\t")[0].strip()
        if label not in position:
            raise DataError(
                f"{path}: {image!r} has class {label!r}, expected <image> tab <id of wnids.txt>"
            )
        found.append((os.fsencode(f"{folder}val/images/{image}"), position[label]))
    if not found:
        raise DataError(f"{path}: no image, expected {_LAYOUT}")
    found.sort()
    return FolderFiles(
        root, np.array([name for name, _ in found]), torch.tensor([label for _, label in found])
    )
