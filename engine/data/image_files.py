"""The encoded images of a split, wherever they lie: files below a folder, or members of tar files.

Loaders read bytes and know nothing of where they come from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .source import read_bytes

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


class ImageFiles:
    """One split of encoded images."""

    labels: Tensor
    """int64 [N], on the CPU."""
    names: np.ndarray
    """bytes [N]: paths of the files below what holds them."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        """Path below the data folder, as quarantine lists name it."""
        raise NotImplementedError

    def where(self, sample: int) -> str:
        """The same as a full path, for messages."""
        raise NotImplementedError

    def read(self, sample: int) -> bytes:
        """The encoded image.

        Raises:
            DataError: it is gone or cannot be read.
        """
        raise NotImplementedError

    def among(self, names: Collection[str]) -> Tensor:
        """bool [N]: which samples have one of these names."""
        found = [self.name(sample) in names for sample in range(len(self))] if names else []
        return torch.tensor(found, dtype=torch.bool) if found else torch.zeros(len(self)).bool()

    def take(self, chosen: Tensor) -> ImageFiles:
        """The samples `chosen` (int64 [M]) alone, in that order."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of all names and labels: whether two runs speak of the same samples."""
        raise NotImplementedError


class FolderFiles(ImageFiles):
    """Files below a folder.

    Args:
        root: The data folder.
        names: Paths below it, as bytes [N]: one array, as forked workers would copy a million
            strings by touching their reference counts.
        labels: int64 [N].
    """

    def __init__(self, root: Path, names: np.ndarray, labels: Tensor) -> None:
        self.root, self.names, self.labels = root, names, labels

    def name(self, sample: int) -> str:
        return os.fsdecode(self.names[sample])

    def where(self, sample: int) -> str:
        return str(self.root / self.name(sample))

    def among(self, names: Collection[str]) -> Tensor:
        listed = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return torch.from_numpy(
            np.isin(self.names, listed)
        )  # a million names in a fifth of a second

    def read(self, sample: int) -> bytes:
        return read_bytes(self.root / self.name(sample))

    def take(self, chosen: Tensor) -> FolderFiles:
        return FolderFiles(self.root, self.names[chosen.numpy()], self.labels[chosen])

    def fingerprint(self) -> str:
        return _digest(self.names, self.labels)


class TarFiles(ImageFiles):
    """Members of uncompressed tar files, read where they lie.

    Args:
        root: The data folder.
        shards: Names of the tar files below it.
        places: int64 [N, 3]: shard, first byte and number of bytes of each member.
        names: Names of the members, as bytes [N].
        labels: int64 [N].
    """

    def __init__(
        self, root: Path, shards: Sequence[str], places: Tensor, names: np.ndarray, labels: Tensor
    ) -> None:
        self.root, self.shards, self.places = root, list(shards), places
        self.names, self.labels = names, labels

    def name(self, sample: int) -> str:
        shard = self.shards[int(self.places[sample, 0])]
        return f"{shard}/{os.fsdecode(self.names[sample])}"

    def where(self, sample: int) -> str:
        return str(self.root / self.name(sample))

    def read(self, sample: int) -> bytes:
        shard, start, size = self.places[sample].tolist()
        path = self.root / self.shards[shard]
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, start)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise DataError(f"{path}: ends within {self.name(sample)}, expected {size} bytes of it")
        return data

    def take(self, chosen: Tensor) -> TarFiles:
        names = self.names[chosen.numpy()]
        return TarFiles(self.root, self.shards, self.places[chosen], names, self.labels[chosen])

    def fingerprint(self) -> str:
        return _digest(self.names, self.labels, "\0".join(self.shards).encode(), self.places)


@dataclass(frozen=True)
class FileSet:
    """Both splits of a data set of image files."""

    root: Path
    train: ImageFiles
    test: ImageFiles
    class_names: list[str]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its suffix, and not hidden (systems and
    archives leave such files beside the real ones)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, hidden entries left out.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def list_images(root: Path, folder: str) -> list[bytes]:
    """Paths below `root` of the images right in `folder`, sorted.

    Raises:
        DataError: there is none.
    """
    files = [entry.name for entry in list_folder(root / folder) if is_image_name(entry.name)]
    if not files:
        raise DataError(f"{root / folder}: no image, expected files named {' '.join(SUFFIXES)}")
    return [os.fsencode(f"{folder}/{file}") for file in files]


def class_folders(root: Path, folders: Sequence[str], labels: Sequence[int]) -> FolderFiles:
    """The images of `folders` below `root`, folder by folder in sorted order.

    Args:
        root: The data folder.
        folders: Paths below it, one a class.
        labels: The label of each folder.

    Raises:
        DataError: A folder holds no image.
    """
    found = [list_images(root, folder) for folder in folders]
    counts = torch.tensor([len(files) for files in found])
    names = np.array([name for files in found for name in files])
    return FolderFiles(root, names, torch.repeat_interleave(torch.tensor(labels), counts))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: It is missing, unreadable or no text.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]


def _digest(*parts: np.ndarray | Tensor | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
