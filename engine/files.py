"""Writing a file so that a reader, or a crash, never meets half of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .errors import StorageError


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a file beside `path`, then puts it in the place of `path`.

    Args:
        path: where the file ends up; its folder is made if absent.
        write: called with the temporary path, which it must create.

    Raises:
        StorageError: the disk refused; `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
