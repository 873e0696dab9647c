"""The encoded images of a split, wherever they lie: files below a folder, or members of tar files.

Loaders read bytes and know nothing of where they come from.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .source import read_bytes

SUFFIXES = (
    ".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".jp2", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip


class ImageFiles(ABC):
    """One split of encoded images."""

    labels: Tensor
    """int64 [N], on the CPU."""
    names: np.ndarray
    """bytes [N]: paths of the files below what holds them."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, sample: int) -> str:
        """Path below the data folder, as quarantine lists name it."""

    @abstractmethod
    def where(self, sample: int) -> str:
        """The same as a full path, for messages."""

    @abstractmethod
    def read(self, sample: int) -> bytes:
        """The encoded image.

        Raises:
            DataError: it is gone or cannot be read.
        """

    def among(self, names: Collection[str]) -> Tensor:
        """bool [N]: which samples have one of these names."""
        found = [self.name(sample) in names for sample in range(len(self))] if names else []
        return torch.tensor(found, dtype=torch.bool) if found else torch.zeros(len(self)).bool()

    @abstractmethod
    def members(self) -> Iterator[tuple[str, str, int | None, int]]:
        """`name`, the file that holds it, its first byte there and its size, of each sample; None
        and 0: it is the whole file."""

    @abstractmethod
    def take(self, chosen: Tensor) -> ImageFiles:
        """The samples `chosen` (int64 [M]) alone, in that order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all names and labels: whether two runs speak of the same samples."""


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

    def members(self) -> Iterator[tuple[str, str, int | None, int]]:
        for sample in range(len(self)):
            yield self.name(sample), self.where(sample), None, 0

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

    def members(self) -> Iterator[tuple[str, str, int | None, int]]:
        for sample, (shard, start, size) in enumerate(self.places.tolist()):
            yield self.name(sample), str(self.root / self.shards[shard]), start, size

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
    folder: str = ""
    """Where the data set lies below `root`, with slashes; "": right there."""
    layout: str = ""
    """Where the images and their labels were found, in words."""
    passed_over: list[str] = field(default_factory=list)
    """Files that are not read, counted, a line a kind."""


class PassedOver:
    """Files among a data set's images that no run reads, counted by the reason.

    Args:
        root: The data folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[tuple[str, str], tuple[int, str]] = {}  # kind -> how many, the first
        self._notes: list[str] = []

    def add(self, what: str, reason: str, path: str) -> None:
        """Count a file or folder by what it is, why it is not read, and its path below `root`."""
        count, first = self._found.get((what, reason), (0, path))
        self._found[what, reason] = (count + 1, min(first, path))

    def note(self, line: str) -> None:
        """Take a line about images that are left out for another reason."""
        self._notes.append(line)

    def add_folder(self, folder: str) -> list[str]:
        """Count the files at any depth below `folder`, a path below the data folder.

        Returns:
            The images among them.
        """
        images = []
        for above, _, files in os.walk(self.root / folder):
            inside = Path(above).relative_to(self.root).as_posix()
            for name in sorted(filter(_is_shown, files)):
                if is_image_name(name):
                    images.append(f"{inside}/{name}")
                else:
                    self.add(*_NO_IMAGE, f"{inside}/{name}")
        for path in images:
            self.add(*_DEEPER, path)
        return images

    def lines(self) -> list[str]:
        """A line for each kind: how many, and one of them."""
        return self._notes + [
            f"passed over: {count:,} {what}{'s' * (count > 1)} {reason} (first: {first})"
            for (what, reason), (count, first) in self._found.items()
        ]


_NO_IMAGE = ("file", "whose ending is not that of an image")
_DEEPER = ("image", "in a folder below that of its class")
BESIDE = ("file", "beside the folders of the classes")
_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")


def _is_shown(name: str) -> bool:
    """Whether a file or folder counts: not hidden, not left behind by a system or an archive."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its suffix, and not hidden (systems and
    archives leave such files beside the real ones)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, without hidden ones and a system's own.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if _is_shown(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is neither a file nor a folder nor a link to nothing: reading it may never end.
    Asks the disk about links and about such ones alone."""
    return not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path)


def list_images(root: Path, folder: str, passed: PassedOver) -> list[bytes]:
    """Paths below `root` of the images right in `folder`, sorted; all else is counted.

    Raises:
        DataError: There is none, or one is a pipe or the like.
    """
    files, deeper = [], []
    for entry in list_folder(root / folder):
        if entry.is_dir():
            deeper += passed.add_folder(f"{folder}/{entry.name}")
        elif is_image_name(entry.name):
            if is_special(entry):
                raise DataError(f"{entry.path}: a pipe, a socket or a device, expected a file")
            files.append(os.fsencode(f"{folder}/{entry.name}"))
        else:
            passed.add(*_NO_IMAGE, f"{folder}/{entry.name}")
    if not files:
        raise DataError(
            f"{root / folder}: no image"
            + (f" right in it, but {len(deeper)} deeper ({min(deeper)})" if deeper else "")
            + f", expected files named {' '.join(SUFFIXES)}"
        )
    return files


def class_folders(
    root: Path, folders: Sequence[str], labels: Sequence[int], passed: PassedOver
) -> FolderFiles:
    """The images of `folders` below `root`, folder by folder in sorted order.

    Args:
        root: The data folder.
        folders: Paths below it, one a class.
        labels: The label of each folder.
        passed: Counts what is not read.

    Raises:
        DataError: A folder holds no image.
    """
    found = [list_images(root, folder, passed) for folder in folders]
    counts = torch.tensor([len(files) for files in found])
    names = np.array([name for files in found for name in files])
    return FolderFiles(root, names, torch.repeat_interleave(torch.tensor(labels), counts))


def check_files_exist(root: Path, names: Sequence[bytes], asked_by: Path) -> None:
    """Refuse a table that names files which are not there.

    Args:
        root: The data folder.
        names: Paths below it.
        asked_by: The table.

    Raises:
        DataError: With the first of them.
    """
    folders: dict[str, set[str]] = {}
    missing = []
    for name in map(os.fsdecode, names):
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            there = (root / folder).is_dir()
            folders[folder] = set(os.listdir(root / folder)) if there else set()
        if file not in folders[folder]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{root / missing[0]}: no such file, but {asked_by.name} names it"
            + (f" ({len(missing)} files are missing)" if len(missing) > 1 else "")
        )


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
