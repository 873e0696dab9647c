"""Image folders of any kind: root/train/<class>/<image> and root/val/<class>/<image>."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..errors import DataError
from .image_files import FileSet, class_folders, list_folder
from .source import find_root

LAYOUT = "train/<class>/<image> and val/<class>/<image> (or test/ in place of val/)"


def find_folder(config: DataConfig) -> FileSet:
    """The images of a folder; classes are the names of the class folders, sorted.

    Raises:
        DataError: A split, class or image is missing, or the splits have different classes.
    """
    root = find_root(config.root, LAYOUT)
    train, test = split_folders(root)
    names = class_names(train)
    check_same_classes(train, names, test, class_names(test))
    labels = range(len(names))
    splits = [class_folders(root, [f"{s.name}/{n}" for n in names], labels) for s in (train, test)]
    return FileSet(root, *splits, class_names=names)


def split_folders(root: Path) -> tuple[Path, Path]:
    """The folders of the training and of the test images.

    Raises:
        DataError: One is missing.
    """
    train = root / "train"
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not train.is_dir():
        raise DataError(f"{root}: found no folder train/, expected {LAYOUT}")
    if not tests:
        raise DataError(f"{root}: found train/ but neither val/ nor test/, expected {LAYOUT}")
    return train, tests[0]


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        DataError: There are fewer than two.
    """
    names = [entry.name for entry in list_folder(folder) if entry.is_dir()]
    if len(names) < 2:
        raise DataError(f"{folder}: found {len(names)} class folders, expected at least 2")
    return names


def check_same_classes(
    train_folder: Path, train_names: list[str], test_folder: Path, test_names: list[str]
) -> None:
    """Refuse splits of different classes.

    Raises:
        DataError: With the first class that one of them lacks.
    """
    for folder, missing in (
        (test_folder, sorted(set(train_names) - set(test_names))),
        (train_folder, sorted(set(test_names) - set(train_names))),
    ):
        if missing:
            raise DataError(
                f"{folder}: lacks {len(missing)} classes of the other split, first {missing[0]!r}, "
                f"expected the same classes in {train_folder.name}/ and {test_folder.name}/"
            )
