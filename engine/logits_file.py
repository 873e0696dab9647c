"""Teacher logits on disk: a file that several processes read and add to.

    magic, key            bytes; the key is one line of JSON: what these logits depend on
    block, block, ...     number of rows (8 bytes), SHA-256 of the rest (32 bytes), places int64
                          [rows], logits [rows, row_bytes]; numbers are little-endian

A file counts for the very key that it begins with, a block if its checksum holds. Whoever adds to
it holds its lock, has read before what others have added, and cuts off what a crash has left of a
block. The file is a cache: whatever is wrong with it, its logits can be computed again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"dfptkd teacher logits 1\n"
SUFFIX = ".logits"
BLOCK_ROWS = 16_384
LOCK_SECONDS = 10.0  # a process that adds to the file needs far less
_COUNT_BYTES = _PLACE_BYTES = 8
_HEAD_BYTES = _COUNT_BYTES + 32

Rows = tuple[np.ndarray, np.ndarray]
"""Places int64 [R], and the bytes of their logits, uint8 [R, row_bytes]."""


class LogitsFile:
    """The rows that are known of one table of logits.

    Args:
        folder: Where it lies, or will; made if absent.
        key: What the logits depend on, as JSON data: it names the file.
        num_places: Places of the table.
        row_bytes: Bytes of the logits of one place.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: Path, key: dict[str, Any], num_places: int, row_bytes: int) -> None:
        self.header = MAGIC + json.dumps(key, sort_keys=True).encode() + b"\n"
        name = hashlib.sha256(self.header).hexdigest()[:16]
        self.path = folder / f"{name}{SUFFIX}"
        self.num_places, self.row_bytes = num_places, row_bytes
        self._read_to, self._inode = 0, -1  # how far the file has been read, and which it was
        folder.mkdir(parents=True, exist_ok=True)

    def exchange(self, install: Callable[[Rows], None], new: Callable[[], Rows]) -> str | None:
        """Take over what others have added, then add what they have not.

        Args:
            install: Gets the rows of each block that was not read before.
            new: The rows to add; called after `install` has had its blocks.

        Returns:
            What was wrong with the file and has been mended, in a phrase; None: nothing.

        Raises:
            OSError: It cannot be read, written or locked; what it held it holds still.
        """
        complaint = None
        while True:
            with self._locked() as file:
                if not self._has_our_key(file):
                    os.replace(self.path, self.path.with_suffix(".aside"))
                    complaint = "holds something else, which is set aside"
                    continue
                if self._read(file, install):
                    complaint = f"damaged from byte {self._read_to:,} on, which is dropped"
                    file.truncate(self._read_to)
                self._append(file, new())
                return complaint

    def _has_our_key(self, file: FileIO) -> bool:
        """Whether the file is ours; one that is empty, or ends within the key, becomes so."""
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._read_to:
            self._inode, self._read_to = status.st_ino, 0
        if self._read_to:
            return True
        found = os.pread(file.fileno(), len(self.header), 0)
        if found != self.header:
            if not self.header.startswith(found):
                return False
            file.truncate(0)
            self._write(file, self.header)
        self._read_to = len(self.header)
        return True

    def _read(self, file: FileIO, install: Callable[[Rows], None]) -> bool:
        """Hand on every sound block from where the last reading ended; whether it ended early."""
        end = os.fstat(file.fileno()).st_size
        while self._read_to < end:
            head = os.pread(file.fileno(), _HEAD_BYTES, self._read_to)
            count = int.from_bytes(head[:_COUNT_BYTES], "little")
            if not 0 < count <= BLOCK_ROWS:
                return True
            size = count * (_PLACE_BYTES + self.row_bytes)
            body = os.pread(file.fileno(), size, self._read_to + _HEAD_BYTES)
            if len(body) < size or _digest(count, body) != head[_COUNT_BYTES:]:
                return True
            places = np.frombuffer(body, "<i8", count).astype(np.int64)
            if places.min() < 0 or places.max() >= self.num_places:
                return True
            rows = np.frombuffer(body, np.uint8, offset=count * _PLACE_BYTES)
            install((places, rows.reshape(count, self.row_bytes)))
            self._read_to += _HEAD_BYTES + size
        return False

    def _append(self, file: FileIO, new: Rows) -> None:
        places, rows = new
        for first in range(0, len(places), BLOCK_ROWS):
            chosen = slice(first, first + BLOCK_ROWS)
            count = len(places[chosen])
            body = places[chosen].astype("<i8").tobytes() + rows[chosen].tobytes()
            block = count.to_bytes(_COUNT_BYTES, "little") + _digest(count, body) + body
            self._write(file, block)
            self._read_to += len(block)

    def _write(self, file: FileIO, data: bytes) -> None:
        """At the end: all of it, or nothing, as a full disk may take a part."""
        end = file.seek(0, os.SEEK_END)
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """The file that the path names, made if absent, and nobody else's inside the block."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
                self._lock(file, deadline)
                if self._is_current(file):
                    yield file
                    return

    def _lock(self, file: FileIO, deadline: float) -> None:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _is_current(self, file: FileIO) -> bool:
        """Whether nobody has put another file there while we waited."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False


def _digest(count: int, body: bytes) -> bytes:
    return hashlib.sha256(count.to_bytes(_COUNT_BYTES, "little") + body).digest()
