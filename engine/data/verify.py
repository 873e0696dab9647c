"""`dfptkd verify-data`: decodes every image of a folder and lists those that cannot be decoded."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from ..errors import DataError, StorageError
from .image_files import SUFFIXES
from .quarantine import LIST_NAME, Quarantine
from .torchvision_loader import one_line, to_rgb

HUGE = 50_000_000  # pixels: 150 MB as 8-bit RGB
_CHUNK = 64  # images handed to a process at a time
_SHOWN = 10  # of the list, on the terminal
_FORMATS = {
    ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".ppm": "PPM",
    ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip


class Member(NamedTuple):
    """An image to look at: a file, or a part of a tar file."""

    name: str
    """Path below the folder, as in a quarantine list."""
    file: str
    """The file that holds it."""
    start: int | None
    """First byte in it; None: it is the whole file."""
    size: int


@dataclass
class Findings:
    """What a look at all images has found."""

    checked: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Name -> why it cannot be decoded."""
    odd: dict[str, list[str]] = field(default_factory=dict)
    """Name -> what is unusual about an image that decodes; loaders convert it."""


def run_verify(folder: Path, out: Path | None, workers: int | None) -> int:
    """Look at every image, write the list, say what was found.

    Args:
        folder: The data folder.
        out: The list; absent: beside the data.
        workers: Processes; absent: one a core.

    Returns:
        0: all sound. 3: some are in quarantine.

    Raises:
        DataError: No such folder, or no image in it.
        StorageError: The list cannot be written there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with images or tar files")
    path = out or folder / LIST_NAME
    _check_writable(path)
    members = find_images(folder)
    if not members:
        raise DataError(f"{folder}: no image, expected files named {' '.join(SUFFIXES)} or .tar")
    findings = verify(members, workers or os.cpu_count() or 1)
    Quarantine(findings.checked, findings.broken).write(path)
    _say(findings, path)
    return DataError.exit_code if findings.broken else 0


def find_images(folder: Path) -> list[Member]:
    """Every image below `folder`, members of tar files included, sorted by name.

    Raises:
        DataError: A tar file is damaged.
    """
    found: list[Member] = []
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            path = os.path.join(parent, file)
            name = Path(os.path.relpath(path, folder)).as_posix()
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                found.append(Member(name, path, None, 0))
            elif file.lower().endswith(".tar"):
                found += _tar_members(path, name)
    return sorted(found)


def verify(members: Sequence[Member], workers: int) -> Findings:
    """Decode each member in one of `workers` processes, with a progress bar."""
    findings = Findings()
    chunks = [members[i : i + _CHUNK] for i in range(0, len(members), _CHUNK)]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=len(members))
        for results in _in_processes(chunks, workers):
            for name, reason, oddities in results:
                findings.checked += 1
                if reason is not None:
                    findings.broken[name] = reason
                elif oddities:
                    findings.odd[name] = oddities
            bar.advance(task, len(results))
    return findings


Result = tuple[str, str | None, list[str]]


def look_at(member: Member) -> Result:
    """Name, why the image cannot be decoded (None: it can), and what is unusual about it."""
    try:
        with open(member.file, "rb") as file:
            file.seek(member.start or 0)
            data = file.read() if member.start is None else file.read(member.size)
    except OSError as error:
        return member.name, f"cannot be read: {error.strerror}", []
    if not data:
        return member.name, "empty", []
    try:
        with Image.open(io.BytesIO(data)) as image:
            oddities = _oddities(image, Path(member.name).suffix.lower())
            to_rgb(image)
    except UnidentifiedImageError:
        return member.name, "not an image", []
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        return member.name, f"damaged: {one_line(error)}", []
    return member.name, None, oddities


def _oddities(image: Image.Image, suffix: str) -> list[str]:
    found = []
    if image.mode in ("CMYK", "YCCK"):
        found.append("CMYK")
    if image.mode.startswith("I"):
        found.append("16-bit")
    if getattr(image, "n_frames", 1) > 1:
        found.append("animated")
    if image.format != _FORMATS.get(suffix, image.format) and image.format != "MPO":
        found.append(f"{image.format} named {suffix}")
    if image.width * image.height > HUGE:
        found.append("huge")
    return found


def _look_at_all(members: Sequence[Member]) -> list[Result]:
    return [look_at(member) for member in members]


def _in_processes(chunks: Sequence[Sequence[Member]], workers: int) -> Iterator[list[Result]]:
    """Results of each chunk, in any order; an image that kills its process is found and named."""
    lost: list[Sequence[Member]] = []
    with ProcessPoolExecutor(workers) as pool:
        waiting = iter(chunks)
        running: dict[Future, Sequence[Member]] = {}
        while True:
            try:
                while len(running) < 2 * workers and (chunk := next(waiting, None)) is not None:
                    lost.append(chunk)  # until it is known to run
                    future = pool.submit(_look_at_all, chunk)
                    running[future] = lost.pop()
            except BrokenProcessPool:
                break
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                chunk = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(chunk)
        lost += [*running.values(), *waiting]
    for chunk in lost:
        for member in chunk:
            yield [_alone(member)]


def _alone(member: Member) -> Result:
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_look_at_all, [member]).result()[0]
        except BrokenProcessPool:
            return member.name, "kills the process that decodes it", []


def _tar_members(path: str, name: str) -> list[Member]:
    try:
        with tarfile.open(path, "r:") as shard:
            return [
                Member(f"{name}/{m.name}", path, m.offset_data, m.size)
                for m in shard
                if m.isfile() and m.name.lower().endswith(SUFFIXES)
            ]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: expected an uncompressed tar file ({error})") from error


def _check_writable(path: Path) -> None:
    """Before an hour of decoding.

    Raises:
        StorageError: The list cannot be written there.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}): expected --out FILE elsewhere"
        ) from error


def _say(findings: Findings, path: Path) -> None:
    print(f"{findings.checked:,} images, {len(findings.broken):,} cannot be decoded")
    for name, reason in sorted(findings.broken.items())[:_SHOWN]:
        print(f"  {name}: {reason}")
    if len(findings.broken) > _SHOWN:
        print(f"  and {len(findings.broken) - _SHOWN} more")
    kinds = Counter(kind for kinds in findings.odd.values() for kind in kinds)
    for kind, count in kinds.most_common():
        example = next(name for name, found in sorted(findings.odd.items()) if kind in found)
        print(f"{count:,} unusual, converted by the loaders: {kind} (first: {example})")
    print(f"list: {path}")
