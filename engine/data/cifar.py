"""CIFAR-10 and CIFAR-100 from the published archives: binary or python, unpacked or as .tar.gz.

Files are judged by size, record count and label range rather than by checksum: repacked copies with
another record order are as good. The python archives are pickles and are read by an unpickler that
knows numpy arrays, lists and dicts only, so that no file can execute code.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .source import ImageData, RawSplit, check_labels, find_root, read_bytes, resident_data

_PIXELS = 3 * 32 * 32
_CROP_PADDING = 4
# Far above the largest published member (155 MB): no archive may fill the memory.
_LARGEST_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class _Layout:
    """One published form of a data set."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    python: bool


@dataclass(frozen=True)
class _CifarSet:
    num_classes: int
    label_bytes: int  # of a binary record; the last one is the label that counts
    label_key: bytes
    names_key: bytes
    num_train: int
    num_test: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layouts: tuple[_Layout, ...]

    @property
    def looked_for(self) -> str:
        """Folders and archives that count as this data set, for messages."""
        folders = [layout.folder + "/" for layout in self.layouts]
        return " or ".join(folders + [layout.archive for layout in self.layouts])


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

_SETS = {
    "cifar10": _CifarSet(
        num_classes=10,
        label_bytes=1,
        label_key=b"labels",
        names_key=b"label_names",
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        layouts=(
            _Layout(
                "cifar-10-batches-bin", "cifar-10-binary.tar.gz",
                tuple(f"{name}.bin" for name in _BATCHES), ("test_batch.bin",), "batches.meta.txt",
                python=False,
            ),
            _Layout(
                "cifar-10-batches-py", "cifar-10-python.tar.gz",
                _BATCHES, ("test_batch",), "batches.meta", python=True,
            ),
        ),
    ),
    "cifar100": _CifarSet(
        num_classes=100,
        label_bytes=2,
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
        num_train=50_000,
        num_test=10_000,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        layouts=(
            _Layout(
                "cifar-100-binary", "cifar-100-binary.tar.gz",
                ("train.bin",), ("test.bin",), "fine_label_names.txt", python=False,
            ),
            _Layout(
                "cifar-100-python", "cifar-100-python.tar.gz",
                ("train",), ("test",), "meta", python=True,
            ),
        ),
    ),
}  # fmt: skip


def load_cifar(config: DataConfig, device: torch.device) -> ImageData:
    """CIFAR-10 or CIFAR-100 on `device`, cut to the configured limits.

    Raises:
        DataError: no copy in the data folder, or one that breaks the published format.
    """
    cifar = _SETS[config.name]
    root = find_root(config.root, cifar.looked_for)
    layout, where, files = _read_files(cifar, root)

    def split(names: tuple[str, ...], total: int) -> RawSplit:
        count = total // len(names)
        parts = [_parse(cifar, layout, files[n], where / n, count) for n in names]
        return RawSplit(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    return resident_data(
        config,
        device,
        split(layout.train, cifar.num_train),
        split(layout.test, cifar.num_test),
        class_names=_class_names(cifar, layout, files, where),
        mean=cifar.mean,
        std=cifar.std,
        default_padding=_CROP_PADDING,
    )


def parse_binary(
    raw: bytes, where: object, *, label_bytes: int, num_records: int, num_classes: int
) -> RawSplit:
    """The records of one file of a binary archive.

    Args:
        raw: the file; a record is `label_bytes` labels and 3,072 pixels, channel by channel.
        where: the file's name, for messages.

    Raises:
        DataError: wrong size, or a label out of range.
    """
    record_bytes = label_bytes + _PIXELS
    if len(raw) != num_records * record_bytes:
        raise DataError(
            f"{where}: found {len(raw):,} bytes, expected {num_records * record_bytes:,} "
            f"({num_records:,} records of {record_bytes:,} bytes)"
        )
    records = np.frombuffer(raw, np.uint8).reshape(num_records, record_bytes)
    labels = check_labels(records[:, label_bytes - 1], num_classes, where)
    return RawSplit(_channels_last(records[:, label_bytes:]), labels)


def parse_python(
    raw: bytes, where: object, *, label_key: bytes, num_records: int, num_classes: int
) -> RawSplit:
    """The records of one file of a python archive.

    Args:
        raw: the file, a pickled dict of b"data" (uint8 [N, 3072]) and `label_key` (N integers).
        where: the file's name, for messages.

    Raises:
        DataError: not such a pickle, another number of records, or a label out of range.
    """
    content = _unpickle_dict(raw, where)
    pixels = _pixel_array(content.get(b"data"))
    if pixels is None or pixels.shape != (num_records, _PIXELS):
        found = "none" if pixels is None else list(pixels.shape)
        raise DataError(
            f"{where}: found pixel array {found}, "
            f"expected b'data' as uint8 [{num_records}, {_PIXELS}]"
        )
    labels = content.get(label_key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(
            f"{where}: found no list of integers {label_key!r}, expected {num_records:,}"
        )
    if len(labels) != num_records:
        raise DataError(f"{where}: found {len(labels):,} labels, expected {num_records:,}")
    # clipped, since a pickled integer may be too large for an array; check_labels still refuses it
    clipped = np.array([min(max(label, -1), num_classes) for label in labels])
    return RawSplit(_channels_last(pixels), check_labels(clipped, num_classes, where))


def _parse(cifar: _CifarSet, layout: _Layout, raw: bytes, where: Path, count: int) -> RawSplit:
    if layout.python:
        return parse_python(
            raw, where, label_key=cifar.label_key, num_records=count, num_classes=cifar.num_classes
        )
    return parse_binary(
        raw, where, label_bytes=cifar.label_bytes, num_records=count, num_classes=cifar.num_classes
    )


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """[N, 3072] -> [N, 32, 32, 3]."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _class_names(
    cifar: _CifarSet, layout: _Layout, files: dict[str, bytes], where: Path
) -> list[str]:
    """Names out of the archive; numbers where a copy comes without its list of names."""
    if layout.names not in files:
        return [str(i) for i in range(cifar.num_classes)]
    where = where / layout.names
    if layout.python:
        listed = _unpickle_dict(files[layout.names], where).get(cifar.names_key)
        names = listed if isinstance(listed, list) else []
    else:
        names = files[layout.names].split()
    if len(names) != cifar.num_classes or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{where}: found {len(names)} class names, expected {cifar.num_classes}")
    return [name.decode("utf-8", "replace") for name in names]


# --- finding and reading the files


def _read_files(cifar: _CifarSet, root: Path) -> tuple[_Layout, Path, dict[str, bytes]]:
    """The layout found under `root`, where it lies, and the content of its files by name."""
    for layout in cifar.layouts:
        for folder in (root / layout.folder, root):
            if (folder / layout.train[0]).is_file():
                return layout, folder, _read_folder(layout, folder)
        if (root / layout.folder).is_dir():
            raise DataError(f"{root / layout.folder / layout.train[0]}: no such file")
    for layout in cifar.layouts:
        archive = root / layout.archive
        if archive.is_file():
            return layout, archive, _read_archive(layout, archive)
    raise DataError(f"{root}: found no CIFAR-{cifar.num_classes}, expected {cifar.looked_for}")


def _read_folder(layout: _Layout, folder: Path) -> dict[str, bytes]:
    files = {name: read_bytes(folder / name) for name in layout.train + layout.test}
    if (folder / layout.names).is_file():
        files[layout.names] = read_bytes(folder / layout.names)
    return files


def _read_archive(layout: _Layout, archive: Path) -> dict[str, bytes]:
    """Wanted members by name, into memory: nothing is unpacked, so no member can write anywhere."""
    wanted = {
        f"{layout.folder}/{name}": name for name in (*layout.train, *layout.test, layout.names)
    }
    files = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or not member.isfile():
                    continue
                if member.size > _LARGEST_MEMBER_BYTES:
                    raise DataError(f"{archive}: {member.name} claims {member.size:,} bytes")
                files[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive}: damaged archive ({error}), expected a .tar.gz") from error
    for name in layout.train + layout.test:
        if name not in files:
            raise DataError(f"{archive}: no member {layout.folder}/{name}")
    return files


# --- the pickles of the python archives


class _PickledArray:
    """Stand-in for numpy.ndarray that only keeps what the pickle says about it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PickledDtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and such: a single-byte type has none."""


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


_KNOWN_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the names of a pickled array to the stand-ins above, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN_GLOBALS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return _KNOWN_GLOBALS[module, name]


def _unpickle_dict(raw: bytes, where: object) -> dict[Any, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not a readable CIFAR python file ({reason})") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: found a pickled {type(content).__name__}, expected a dict")
    return content


def _pixel_array(pickled: Any) -> np.ndarray | None:
    """The uint8 array that a stand-in describes; None if it describes none."""
    match getattr(pickled, "state", None):
        case (_, (int(rows), int(columns)), _PickledDtype(code=code), fortran, bytes(raw)):
            fits = rows >= 0 and columns >= 0 and rows * columns == len(raw)
            if fits and code in (b"u1", "u1") and not fortran:
                return np.frombuffer(raw, np.uint8).reshape(rows, columns)
    return None
