"""`dfptkd verify-data`: decodes every image of a folder and lists those that cannot be decoded."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from ..errors import DataError, StorageError
from ..files import first_line
from .image_files import SUFFIXES, is_image_name, list_folder
from .quarantine import LIST_NAME, Quarantine
from .torchvision_loader import to_rgb

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
    """Every image below `folder`, members of tar files included, sorted by name."""
    found: list[Member] = []
    for path in _files_below(str(folder), frozenset()):
        name = Path(os.path.relpath(path, folder)).as_posix()
        if path.lower().endswith(".tar"):
            found += _tar_members(path, name)
        elif is_image_name(os.path.basename(path)):
            found.append(Member(name, path, None, 0))
    return sorted(found)


def _files_below(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Files at any depth, hidden ones left out; a link to a folder that it lies in is not taken."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in list_folder(Path(folder)):
        if entry.is_dir():
            yield from _files_below(entry.path, above | {real})
        else:
            yield entry.path


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
    if member.start is None and member.file.lower().endswith(".tar"):
        return member.name, "damaged or compressed tar file", []
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
        return member.name, f"damaged: {first_line(error)}", []
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
    waiting = iter(chunks)
    while True:
        suspects = yield from _until_broken(waiting, workers)
        if not suspects:
            return
        for chunk in suspects:
            for member in chunk:
                yield [_alone(member)]


def _until_broken(
    waiting: Iterator[Sequence[Member]], workers: int
) -> Generator[list[Result], None, list[Sequence[Member]]]:
    """Results until a process dies; returns the chunks under way then, none at the end."""
    running: dict[Future, Sequence[Member]] = {}
    lost: list[Sequence[Member]] = []
    with ProcessPoolExecutor(workers, initializer=_be_quiet) as pool:
        while not lost:
            try:
                while len(running) < 2 * workers and (chunk := next(waiting, None)) is not None:
                    lost.append(chunk)  # until it is known to run
                    running[pool.submit(_look_at_all, chunk)] = chunk
                    lost.pop()
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
    return lost + list(running.values())


def _be_quiet() -> None:
    """In a process that decodes: Pillow's warnings are no findings, and the terminal has a bar."""
    warnings.simplefilter("ignore")
    sys.stderr = sys.__stderr__


def _alone(member: Member) -> Result:
    with ProcessPoolExecutor(1, initializer=_be_quiet) as pool:
        try:
            return pool.submit(_look_at_all, [member]).result()[0]
        except BrokenProcessPool:
            return member.name, "kills the process that decodes it", []


def _tar_members(path: str, name: str) -> list[Member]:
    """The images in a tar file; of a damaged one those before the damage, and the file itself."""
    found = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile() and is_image_name(os.path.basename(member.name)):
                    place = (path, member.offset_data, member.size)
                    found.append(Member(f"{name}/{member.name}", *place))
    except (OSError, tarfile.TarError):
        found.append(Member(name, path, None, 0))
    return found


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
