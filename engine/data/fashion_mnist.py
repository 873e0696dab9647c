"""Fashion-MNIST, found in this order: a local copy, torchvision's download, the Debian package.

A fetched copy goes into the cache folder, $XDG_CACHE_HOME/dfptkd/fashion-mnist, and counts as local
from then on. Fetching needs no root rights and leaves the system's package state alone.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError, StorageError
from .source import ImageData, RawSplit, check_labels, find_root, read_bytes, resident_data

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_FILES = tuple(
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_NUM_TRAIN, _NUM_TEST, _SIDE = 60_000, 10_000, 28
_MEAN, _STD = 0.2860, 0.3530
_CROP_PADDING = 2
_SYSTEM_FOLDER = Path("usr/share/datasets/fashion-mnist")  # below / and inside the Debian package
_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_SOCKET_TIMEOUT_S = 5
_FETCH_TIMEOUT_S = 180


def load_fashion_mnist(config: DataConfig, device: torch.device) -> ImageData:
    """Fashion-MNIST on `device` with its grey value in three equal channels.

    Raises:
        DataError: no copy can be found or fetched, or one breaks the published format.
        StorageError: the cache folder cannot be written.
    """
    train, test = _find_local(config.root) or _fetch()
    return resident_data(
        config,
        device,
        train,
        test,
        class_names=list(CLASS_NAMES),
        mean=(_MEAN, _MEAN, _MEAN),
        std=(_STD, _STD, _STD),
        default_padding=_CROP_PADDING,
    )


def parse_idx(compressed: bytes, where: object, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array in a gzip-compressed idx file.

    Args:
        compressed: the file: bytes 0, 0, 8 (unsigned byte) and the number of dimensions; each
            dimension as a big-endian 32-bit number; the values.
        where: the file's name, for messages.
        shape: the shape that the file must have.

    Raises:
        DataError: not gzip, or another magic number, shape or length.
    """
    try:
        raw = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: damaged gzip file ({error})") from error
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes()
    if raw[: len(header)] != header:
        raise DataError(
            f"{where}: found header {raw[: len(header)].hex()}, "
            f"expected {header.hex()} (idx, bytes {list(shape)})"
        )
    values = np.frombuffer(raw, np.uint8, offset=len(header))
    if len(values) != np.prod(shape):
        raise DataError(f"{where}: found {len(values):,} values, expected {np.prod(shape):,}")
    return values.reshape(shape)


def read_folder(folder: Path) -> tuple[RawSplit, RawSplit]:
    """Training and test split out of the four published files.

    Raises:
        DataError: a file is missing or breaks the format.
    """

    def split(prefix: str, count: int) -> RawSplit:
        paths = [folder / f for f in _FILES if f.startswith(prefix)]
        images = parse_idx(read_bytes(paths[0]), paths[0], (count, _SIDE, _SIDE))
        labels = parse_idx(read_bytes(paths[1]), paths[1], (count,))
        return RawSplit(
            np.repeat(images[..., None], 3, axis=-1),
            check_labels(labels, len(CLASS_NAMES), paths[1]),
        )

    return split("train", _NUM_TRAIN), split("t10k", _NUM_TEST)


def cache_folder() -> Path:
    """Where a fetched copy is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dfptkd" / "fashion-mnist"


def _find_local(root: str | None) -> tuple[RawSplit, RawSplit] | None:
    folders = [cache_folder(), "/" / _SYSTEM_FOLDER]
    if root or os.environ.get("DFPTKD_DATA"):
        base = find_root(root, ", ".join(_FILES))
        # the last one is where torchvision puts its download
        folders = [base, base / "fashion-mnist", base / "FashionMNIST" / "raw", *folders]
    for folder in folders:
        if all((folder / name).is_file() for name in _FILES):
            return read_folder(folder)
    return None


def _fetch() -> tuple[RawSplit, RawSplit]:
    print("Fashion-MNIST: no local copy, fetching 31 MB ...", file=sys.stderr)
    reasons = []
    for fetch in (_from_torchvision, _from_debian):
        with tempfile.TemporaryDirectory(prefix="dfptkd-") as scratch:
            try:
                folder = fetch(Path(scratch))
                splits = read_folder(folder)
            except (DataError, OSError) as error:
                reasons.append(str(error))
                continue
            _publish(folder, cache_folder())
            return splits
    raise DataError(
        f"Fashion-MNIST: no local copy in --data.root, DFPTKD_DATA, {cache_folder()} or "
        f"/{_SYSTEM_FOLDER}; torchvision's download failed ({reasons[0]}); the Debian package "
        f"{_DEBIAN_PACKAGE} failed ({reasons[1]}); put {', '.join(_FILES)} into one of the folders"
    )


def _from_torchvision(scratch: Path) -> Path:
    # A process of its own: the short socket timeout and the progress bars would be global here.
    code = (
        f"import socket, sys; socket.setdefaulttimeout({_SOCKET_TIMEOUT_S}); "
        "from torchvision.datasets import FashionMNIST; FashionMNIST(sys.argv[1], download=True)"
    )
    _run([sys.executable, "-c", code, str(scratch)], scratch)
    return scratch / "FashionMNIST" / "raw"


def _from_debian(scratch: Path) -> Path:
    download = ["apt-get", "download", _DEBIAN_PACKAGE]
    try:
        _run(download, scratch)
    except DataError:
        # No package lists: fetch them into our own folder, with the system's sources and keys.
        for folder in ("lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        private = [
            "-o", f"Dir::State::lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}",
        ]  # fmt: skip
        # a failing hook or mirror may still leave good lists: the download decides
        with contextlib.suppress(DataError):
            _run(["apt-get", *private, "update"], scratch)
        _run(["apt-get", *private, *download[1:]], scratch)
    packages = list(scratch.glob(f"{_DEBIAN_PACKAGE}_*.deb"))
    if len(packages) != 1:
        raise DataError(f"apt-get download left {len(packages)} packages, expected 1")
    _run(["dpkg-deb", "-x", str(packages[0]), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked" / _SYSTEM_FOLDER


def _run(command: list[str], folder: Path) -> None:
    """Runs quietly; a failure's last line of output becomes the message of a DataError."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=_FETCH_TIMEOUT_S, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} took more than {_FETCH_TIMEOUT_S} s") from error
    if done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise DataError(last_line or f"{command[0]} left with {done.returncode}")


def _publish(folder: Path, cache: Path) -> None:
    """Copies the files into the cache, each under its name only once it is whole."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            partial = cache / f".{name}.{os.getpid()}.partial"
            shutil.copyfile(folder / name, partial)
            partial.replace(cache / name)
    except OSError as error:
        raise StorageError(
            f"{cache}: cannot be written ({error.strerror}), expected a writable cache folder "
            "(set XDG_CACHE_HOME)"
        ) from error
