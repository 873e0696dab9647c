"""`dfptkd verify-data`: what a run would refuse in a data folder, before the run.

It is read by the same functions as a run reads it; then every image is decoded, and those that
cannot be are listed for runs to replace.
"""

from __future__ import annotations

import hashlib
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

from ..config import DataConfig
from ..errors import DataError, StorageError, UsageError
from ..files import first_line
from . import imagenet, tiny_imagenet
from .file_data import SOURCES, find_files, find_rule
from .image_files import SUFFIXES, FileSet, is_image_name, is_special, list_folder
from .look import look_into
from .quarantine import LIST_NAME, Quarantine
from .torchvision_loader import to_rgb

HUGE = 50_000_000  # pixels: 150 MB as 8-bit RGB
_CHUNK = 64  # images handed to a process at a time
_SHOWN = 10  # of the list, on the terminal
_FORMATS = {
    ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".ppm": "PPM",
    ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".jpe": "JPEG", ".jfif": "JPEG",
    ".avif": "AVIF", ".jp2": "JPEG2000", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
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
    digests: dict[str, bytes] = field(default_factory=dict)
    """Name -> hash of the bytes that could be read."""


@dataclass(frozen=True)
class Layout:
    """A folder as a run reads it."""

    name: str
    """`--data.name` of a run that reads it."""
    files: FileSet | None
    """The samples; None: every run refuses the folder."""
    words: str
    """The samples and how they are cut, or why a run refuses."""


def run_verify(folder: Path, out: Path | None, workers: int | None, name: str | None = None) -> int:
    """Read the folder as a run does, decode every image, write the list, say what was found.

    Args:
        folder: The data folder.
        out: The list; absent: beside the data.
        workers: Processes; absent: one a core.
        name: As which data set a run reads it; absent: what its layout looks like.

    Returns:
        0: a run takes it, and all is sound. 3: every run refuses it, or images are in quarantine.

    Raises:
        UsageError: No such data set, or it is not one of image files.
        DataError: No such folder, or no image in it.
        StorageError: The list cannot be written there.
    """
    if name not in (None, *SOURCES):
        raise UsageError(f"--data.name {name}: expected one of {' '.join(SOURCES)}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with images or tar files")
    path = out or folder / LIST_NAME
    _check_writable(path)
    layout = find_layout(folder, name)
    members = find_images(folder) if layout.files is None else members_of(layout.files)
    if not members:
        raise DataError(f"{folder}: no image, expected files named {' '.join(SUFFIXES)} or .tar")
    findings = verify(members, workers or os.cpu_count() or 1)
    Quarantine(findings.checked, findings.broken).write(path)
    _say(findings, layout, path)
    return DataError.exit_code if findings.broken or layout.files is None else 0


# What a run makes of the folder -------------------------------------------------------------------


def find_layout(folder: Path, name: str | None) -> Layout:
    """The folder as a run reads it.

    Args:
        folder: The data folder.
        name: As which data set; None: as the one that it looks like.
    """
    name = name or looks_like(folder)
    config = DataConfig(name=name, root=str(folder))  # type: ignore[arg-type]
    try:
        found = find_files(config)
    except (DataError, UsageError) as error:
        return Layout(name, None, str(error))
    looks = [look_into(files) for files in (found.train, found.test)]
    words = (
        f"{found.layout}: {len(found.train.labels.unique()):,} classes, {len(found.train):,} "
        f"training and {len(found.test):,} test images; {find_rule(config, looks)[1]}"
    )
    return Layout(name, found, words)


def looks_like(folder: Path) -> str:
    """The data set that a folder is most likely meant as."""

    def has(*patterns: str) -> bool:
        return any(next(folder.glob(pattern), None) is not None for pattern in patterns)

    if has(tiny_imagenet.WNIDS, tiny_imagenet.ANNOTATIONS, f"{tiny_imagenet.INNER}/"):
        return "tiny_imagenet"
    if has("CUB_200_2011/", "train_test_split.txt", "image_class_labels.txt"):
        return "cub200"
    if has("train-*.tar", "val-*.tar", "test-*.tar"):
        return "webdataset"
    if has("ILSVRC2012_devkit_t12*", imagenet.CSV) or imagenet.data_folder(folder):
        return "imagenet"
    classes = {entry.name for entry in folder.glob("train/*") if entry.is_dir()}
    if not classes or not all(imagenet.WORDNET_ID.fullmatch(name) for name in classes):
        return "folder"
    return "imagenet" if imagenet.are_classes(classes) else "folder"


def members_of(found: FileSet) -> list[Member]:
    """Every image that a run reads, sorted by name."""
    found_members = (files.members() for files in (found.train, found.test))
    return sorted(Member(*member) for members in found_members for member in members)


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
    """Files at any depth, hidden ones, pipes and the like left out; a link to a folder that it lies
    in is not taken."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in list_folder(Path(folder)):
        if entry.is_dir():
            yield from _files_below(entry.path, above | {real})
        elif not is_special(entry):
            yield entry.path


def verify(members: Sequence[Member], workers: int) -> Findings:
    """Decode each member in one of `workers` processes, with a progress bar."""
    findings = Findings()
    chunks = [members[i : i + _CHUNK] for i in range(0, len(members), _CHUNK)]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=len(members))
        for results in _in_processes(chunks, workers):
            for name, reason, oddities, digest in results:
                findings.checked += 1
                if digest is not None:
                    findings.digests[name] = digest
                if reason is not None:
                    findings.broken[name] = reason
                elif oddities:
                    findings.odd[name] = oddities
            bar.advance(task, len(results))
    return findings


Result = tuple[str, str | None, list[str], bytes | None]


def look_at(member: Member) -> Result:
    """Name, why the image cannot be decoded (None: it can), what is unusual about it, and a hash of
    its bytes (None: they could not be read)."""
    if member.start is None and member.file.lower().endswith(".tar"):
        return member.name, "damaged or compressed tar file", [], None
    try:
        with open(member.file, "rb") as file:
            file.seek(member.start or 0)
            data = file.read() if member.start is None else file.read(member.size)
    except OSError as error:
        return member.name, f"cannot be read: {error.strerror}", [], None
    if not data:
        return member.name, "empty", [], None
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            oddities = _oddities(image, Path(member.name).suffix.lower())
            to_rgb(image)
    except UnidentifiedImageError:
        return member.name, "not an image", [], digest
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        return member.name, f"damaged: {first_line(error)}", [], digest
    return member.name, None, oddities, digest


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
            return member.name, "kills the process that decodes it", [], None


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


def _say(findings: Findings, layout: Layout, path: Path) -> None:
    print(f"{findings.checked:,} images, {len(findings.broken):,} cannot be decoded")
    for name, reason in sorted(findings.broken.items())[:_SHOWN]:
        print(f"  {name}: {reason}")
    if len(findings.broken) > _SHOWN:
        print(f"  and {len(findings.broken) - _SHOWN} more")
    kinds = Counter(kind for kinds in findings.odd.values() for kind in kinds)
    for kind, count in kinds.most_common():
        example = next(name for name, found in sorted(findings.odd.items()) if kind in found)
        print(f"{count:,} unusual, converted by the loaders: {kind} (first: {example})")
    for line in same_images(findings, layout.files) if layout.files else ():
        print(line)
    if layout.files is None:
        print(f"every run with --data.name {layout.name} refuses this folder: {layout.words}")
    else:
        print(f"--data.name {layout.name}: {layout.words}")
        for line in layout.files.passed_over:
            print(line)
    print(f"list: {path}")


def same_images(findings: Findings, found: FileSet) -> list[str]:
    """A line for each kind of images that are there twice, byte by byte."""
    split_and_label = {
        name: (split, label)
        for split, files in (("train", found.train), ("test", found.test))
        for (name, *_), label in zip(files.members(), files.labels.tolist(), strict=True)
    }
    kinds: dict[str, list[tuple[str, str]]] = {}
    seen: dict[bytes, str] = {}
    for name, digest in sorted(findings.digests.items()):
        first = seen.setdefault(digest, name)
        if first == name:
            continue
        (split, label), (first_split, first_label) = split_and_label[name], split_and_label[first]
        kind = "within a class"
        if label != first_label:
            kind = "in two classes"
        elif split != first_split:
            kind = "in both splits"
        kinds.setdefault(kind, []).append((name, first))
    return [
        f"{len(pairs):,} {'image is' if len(pairs) == 1 else 'images are'} there twice {kind} "
        f"(first: {pairs[0][0]} = {pairs[0][1]})"
        for kind, pairs in kinds.items()
    ]
