"""WebDataset shards: train-*.tar and val-*.tar of <key>.jpg with <key>.cls beside it.

The tar files are indexed once and read where they lie, so that samples come in any order. They must
be uncompressed. classes.txt beside them may name the classes, a line each.
"""

from __future__ import annotations

import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .image_files import SUFFIXES, FileSet, PassedOver, TarFiles, read_lines
from .source import find_root

_LAYOUT = "train-*.tar and val-*.tar (or test-*.tar) of <key>.jpg and <key>.cls"


# Bytes of shards that one process indexes in a second or two: no reason to fork for, beside the
# threads that a process of several runs may have.
_SOON_READ = 2 << 30


def find_webdataset(config: DataConfig) -> FileSet:
    """The images of the shards.

    Raises:
        DataError: No shards, a damaged one, an image without label, or a label out of range.
    """
    root = find_root(config.root, _LAYOUT)
    passed = PassedOver(root)
    train = _index(root, "train", passed)
    held_out = "val" if any(root.glob("val-*.tar")) else "test"
    test = _index(root, held_out, passed)
    highest = int(max(train.labels.max(), test.labels.max()))
    names = [str(i) for i in range(highest + 1)]
    if (root / "classes.txt").is_file():
        names = [line.strip() for line in read_lines(root / "classes.txt")]
        if len(names) <= highest:
            raise DataError(
                f"{root / 'classes.txt'}: {len(names)} classes, but a shard has label {highest}"
            )
    if len(names) < 2:
        raise DataError(f"{root}: found {len(names)} class, expected at least 2")
    layout = f"train-*.tar and {held_out}-*.tar"
    return FileSet(root, train, test, names, layout=layout, passed_over=passed.lines())


def _index(root: Path, split: str, passed: PassedOver) -> TarFiles:
    shards = sorted(path.name for path in root.glob(f"{split}-*.tar"))
    if not shards:
        raise DataError(f"{root}: found no {split}-*.tar, expected {_LAYOUT}")
    places, names, labels = [], [], []
    paths = [root / shard for shard in shards]
    processes = min(len(paths), os.cpu_count() or 1)
    if sum(path.stat().st_size for path in paths if path.is_file()) < _SOON_READ:
        found = list(map(_members, paths))
    else:
        with ProcessPoolExecutor(processes) as pool:  # ImageNet alone: 70 s
            found = list(pool.map(_members, paths))
    for number, (members, without) in enumerate(found):
        for name, start, size, label in members:
            places.append((number, start, size))
            names.append(os.fsencode(name))
            labels.append(label)
        for key in without:
            passed.add("label", "without an image that is read", f"{shards[number]}/{key}")
    return TarFiles(root, shards, torch.tensor(places), np.array(names), torch.tensor(labels))


def _members(path: Path) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """Name, first byte, bytes and label of each image of a shard, in its order; and the labels that
    have no image."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                key, _, suffix = file.partition(".")  # WebDataset's keys end at the first dot
                key = f"{folder}/{key}"
                if suffix == "cls":
                    content = shard.extractfile(member)
                    text = content.read(32).strip() if content else b""
                    if not (text.isdigit() and len(text) < 10):
                        raise DataError(f"{path}/{member.name}: expected a class number from 0")
                    if labels.setdefault(key, int(text)) != int(text):
                        raise DataError(f"{path}/{member.name}: is there twice, with two classes")
                elif f".{suffix}".lower() in SUFFIXES:
                    if key in images:
                        raise DataError(f"{path}/{member.name}: a second image under its key")
                    images[key] = (member.name, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: expected an uncompressed tar file ({error})") from error
    for key, (name, _, _) in images.items():
        if key not in labels:
            raise DataError(f"{path}/{name}: no .cls beside it, expected {_LAYOUT}")
    if not images:
        raise DataError(f"{path}: no image, expected {_LAYOUT}")
    without = [f"{key}.cls".lstrip("/") for key in labels if key not in images]
    return [(*place, labels[key]) for key, place in images.items()], without
