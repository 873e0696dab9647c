"""One run on one folder: a lock that its process holds for as long as it lives.

    <out>/.lock     {"host": ..., "pid": ..., "started": ...}, for the message to those refused

The kernel holds the lock (flock), not the file: one left behind by a dead process is no obstacle.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .errors import StorageError, UsageError
from .files import first_line

LOCK_NAME = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_ATTEMPTS = 100
_held: set[int] = set()


def _let_go_in_child() -> None:
    """A forked data worker must not keep the lock of a parent that died."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class RunLock:
    """Context manager: the folder is this process's alone, or it is refused.

    Args:
        folder: The run folder; made if absent, and removed again if nothing was put into it.
        warn: Gets one line where the file system knows no locks; the run then goes on without.

    Raises:
        UsageError: Another process, or another run in this one, holds the folder; who is named.
        StorageError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = print) -> None:
        self.folder, self.warn = folder, warn
        self.path = folder / LOCK_NAME
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        try:
            self._handle = self._open_locked()
        except OSError as error:
            if self.folder.exists() and not self.folder.is_dir():
                raise StorageError(f"{self.folder}: a file, expected a folder") from error
            raise StorageError(f"{self.path}: could not be locked: {first_line(error)}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is None:
            return
        with suppress(OSError):
            self.path.unlink()  # while it is still ours
        _held.discard(self._handle)
        os.close(self._handle)
        self._handle = None
        with suppress(OSError):  # it holds something, as it should
            self.folder.rmdir()

    def _open_locked(self) -> int | None:
        """The lock file, locked and with our name in it; None where locks are not supported."""
        while True:
            handle = self._open()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno in _TAKEN:
                    raise UsageError(self._refusal()) from None
                if error.errno not in _NOT_SUPPORTED:
                    raise
                self.warn(
                    f"{self.path}: locks do not work here ({first_line(error)}): nothing keeps a "
                    "second run off this folder"
                )
                return None
            if self._is_current(handle):
                break
            os.close(handle)  # the one before us has removed it in the meantime
        _held.add(handle)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        with suppress(OSError):  # a full disk: the lock holds without its text
            os.truncate(handle, 0)
            os.write(handle, json.dumps(holder).encode())
        return handle

    def _open(self) -> int:
        """The lock file, in a folder that one who leaves may just be removing."""
        for attempt in range(_ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except (FileNotFoundError, FileExistsError):
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _is_current(self, handle: int) -> bool:
        """Whether the locked file is the one that the path names."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            who = "process {pid} on {host} since {started}".format(**holder)
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            who = "another process"
        return f"{self.folder}: in use by {who}: expected another --out, or to wait until it ends"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
