"""Files that a crash may interrupt, and files that somebody else wrote.

Ours are written so that a reader, or a crash, never meets half of one. Foreign ones are read so
that whatever they hold is either what it should be or one line of complaint.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError, StorageError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


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
        flush(temporary)
        temporary.replace(path)
    except disk_errors() as error:
        raise StorageError(f"{path}: could not be written: {first_line(error)}") from error
    finally:
        with suppress(OSError):  # a disk that is read-only by now: `remove_temporary` comes later
            temporary.unlink(missing_ok=True)
    return path


def disk_errors() -> tuple[type[Exception], ...]:
    """What a write raises that the disk refuses.

    Steps and kernels are measured where safetensors is not installed: it is imported by who reads
    or writes its files, and where nobody has, its writer has raised nothing.
    """
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


def remove_temporary(folder: Path) -> None:
    """Delete what crashes inside `write_atomically` have left in `folder`, as far as that goes.

    Only for a folder that nobody else is writing into.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        expected: what it should be, for the message: "a run.json".

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected {expected}: {first_line(error)}") from None


def save_file(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file."""
    from safetensors.torch import save_file as write

    write(tensors, path, metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a header that lies can make torch raise anything
        raise DataError(f"{path}: damaged safetensors file ({first_line(error)})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; none of its tensors is read.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as error:  # a header that lies can raise anything
        raise DataError(f"{path}: damaged safetensors file ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = getattr(error, "strerror", None) or str(error)
    lines = str(text).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__
