"""Image folders of any kind: root/train/<class>/<image> and root/val/<class>/<image>."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

from ..config import DataConfig
from ..errors import DataError
from .image_files import BESIDE, FileSet, PassedOver, class_folders, list_folder
from .source import find_root

LAYOUT = "train/<class>/<image> and val/<class>/<image> (or test/ in place of val/)"


def find_folder(config: DataConfig) -> FileSet:
    """The images of a folder; classes are the names of the class folders, sorted.

    Raises:
        DataError: A split, class or image is missing, or the splits have different classes.
    """
    root = find_root(config.root, LAYOUT)
    train, test = split_folders(root)
    passed = PassedOver(root)
    names, test_names = (class_names(root, split, passed) for split in (train, test))
    check_classes(root / test, names, test_names, f"{train}/ has")
    check_classes(root / train, test_names, names, f"{test}/ has")
    files = [
        class_folders(root, [f"{split}/{name}" for name in names], range(len(names)), passed)
        for split in (train, test)
    ]
    layout = f"{train}/ and {test}/"
    if test == "val" and (root / "test").is_dir():
        layout += " (test/ is not read)"
    return FileSet(root, *files, class_names=names, layout=layout, passed_over=passed.lines())


def split_folders(root: Path, folder: str = "", layout: str = LAYOUT) -> tuple[str, str]:
    """The folders of the training and of the test images, as paths below `root`.

    Args:
        root: The data folder.
        folder: Where to look for them below it: "", or a path that ends in a slash.
        layout: What is expected, for the message.

    Raises:
        DataError: One is missing.
    """
    tests = [name for name in ("val", "test") if (root / folder / name).is_dir()]
    if not (root / folder / "train").is_dir():
        raise DataError(f"{root / folder}: found no folder train/, expected {layout}")
    if not tests:
        raise DataError(
            f"{root / folder}: found train/ but neither val/ nor test/, expected {layout}"
        )
    return f"{folder}train", f"{folder}{tests[0]}"


def class_names(root: Path, split: str, passed: PassedOver) -> list[str]:
    """Names of the class folders, sorted; files beside them are counted.

    Args:
        root: The data folder.
        split: The folder of the class folders, a path below it.
        passed: Counts what is not read.

    Raises:
        DataError: There are fewer than two.
    """
    names = []
    for entry in list_folder(root / split):
        if entry.is_dir():
            names.append(entry.name)
        else:
            passed.add(*BESIDE, f"{split}/{entry.name}")
    if len(names) < 2:
        raise DataError(f"{root / split}: found {len(names)} class folders, expected at least 2")
    return names


def check_classes(
    folder: Path, wanted: Collection[str], there: Collection[str], asked_by: str
) -> None:
    """Refuse a split that lacks classes.

    Args:
        folder: The split's folder.
        wanted: Classes that it must have.
        there: Classes that it has.
        asked_by: Who says so, with a verb: "train/ has".

    Raises:
        DataError: With the first class that is missing.
    """
    missing = sorted(set(wanted) - set(there))
    if missing:
        count = "1 class" if len(missing) == 1 else f"{len(missing):,} classes"
        first = unicodedata.normalize("NFC", missing[0])
        same = [name for name in there if unicodedata.normalize("NFC", name) == first]
        raise DataError(
            f"{folder}: lacks {count} that {asked_by}, first {missing[0]!r}"
            + (f" = {missing[0]!a}, there written {same[0]!a}" if same else "")
        )
