"""The quarantine list: images that cannot be decoded, with a reason each.

`dfptkd verify-data` writes it, loaders honour it: a training image on it is replaced, always by the
same other one in the same epoch; a test image on it is never replaced.

    {"format": "dfptkd.quarantine/1", "checked": 1281167, "images": {"train/n01/x.JPEG": "empty"}}

Paths are relative to the data folder, with slashes.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..files import write_atomically
from .image_files import FileSet
from .order import Stream, hash_bits, integers

LIST_NAME = "dfptkd-quarantine.json"
FORMAT = "dfptkd.quarantine/1"


@dataclass(frozen=True)
class Quarantine:
    """A list as read or as found."""

    checked: int
    """Images that were looked at."""
    images: dict[str, str]
    """Path below the data folder -> reason."""

    def write(self, path: Path) -> None:
        """Put the list on disk, whole or not at all.

        Raises:
            StorageError: The disk refused.
        """
        value = {"format": FORMAT, "checked": self.checked, "images": self.images}
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_quarantine(path: Path) -> Quarantine:
    """The list in a file.

    Raises:
        DataError: It is missing, or no quarantine list.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a quarantine list in JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{path}: expected a quarantine list with format {FORMAT!r}")
    images, checked = value.get("images"), value.get("checked")
    if not isinstance(images, dict) or not all(isinstance(r, str) for r in images.values()):
        raise DataError(f"{path}: 'images' must hold a reason for each path")
    if not isinstance(checked, int) or isinstance(checked, bool) or checked < len(images):
        raise DataError(f"{path}: 'checked' must be a number of images, at least {len(images)}")
    return Quarantine(checked, images)


def find_quarantine(found: FileSet, given: str | None) -> tuple[Quarantine, Path | None]:
    """The list that was named, else the one beside the data, else an empty one.

    A list may have been written for the folder that the data set lies in below its root, for one
    between the two, or for the folder above the root: its names are given back as from the root.

    Raises:
        DataError: It cannot be read or is none; or it was named, and lists other files.
    """
    if given is not None:
        path = Path(given).expanduser()
        quarantine = read_quarantine(path)
        names = _from_root(quarantine.images, found)
        if quarantine.images and not names:
            raise DataError(
                f"{path}: {next(iter(quarantine.images))!r} and the others are not below "
                f"{found.root}: expected a list by dfptkd verify-data {found.root}"
            )
        return Quarantine(quarantine.checked, names), path
    for folder in ("", *_folders_below(found)):
        path = found.root / folder / LIST_NAME
        if path.exists():
            quarantine = read_quarantine(path)
            return Quarantine(quarantine.checked, _from_root(quarantine.images, found)), path
    path = found.root.parent / LIST_NAME
    with suppress(DataError):  # what lies above is not this data set's, unless it says so
        quarantine = read_quarantine(path)
        if names := _from_root(quarantine.images, found):
            return Quarantine(quarantine.checked, names), path
    return Quarantine(0, {}), None


def _folders_below(found: FileSet) -> list[str]:
    """The folder of a data set below its root, and those between the two."""
    parts = found.folder.split("/") if found.folder else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _from_root(listed: dict[str, str], found: FileSet) -> dict[str, str]:
    """A list by paths below the data set's root, whatever folder it was written for; empty if it
    names none of the images."""
    above = Path(os.path.abspath(found.root)).name + "/"
    for names in (
        listed,
        *(
            {f"{folder}/{name}": why for name, why in listed.items()}
            for folder in _folders_below(found)
        ),
        {name.removeprefix(above): why for name, why in listed.items() if name.startswith(above)},
    ):
        if found.train.among(names).any() or found.test.among(names).any():
            return names
    return {}


def check_share(listed: Tensor, cap: float, path: Path | None) -> None:
    """Refuse a training split of which too much is on the list.

    Args:
        listed: bool [N].
        cap: Largest share that may be.
        path: Of the list.

    Raises:
        DataError: More than that.
    """
    count, total = int(listed.sum()), len(listed)
    if count > cap * total:
        raise DataError(
            f"{path}: {count} of {total} training images are in quarantine "
            f"({100 * count / total:.3g} %), expected at most {100 * cap:.3g} % "
            "(--data.max-quarantined); mend the data and run dfptkd verify-data again"
        )


def replace_listed(
    samples: Tensor, listed: Tensor, labels: Tensor, *, seed: int, epoch: int
) -> Tensor:
    """`samples` with those on the list replaced by sound ones of the same class.

    The replacement is a pure function of (seed, epoch, sample); of a class without a sound image,
    any sound image.

    Args:
        samples: int64 [M], sample numbers.
        listed: bool [N].
        labels: int64 [N].
    """
    at = listed[samples].nonzero()[:, 0]
    if not len(at):
        return samples
    sound = (~listed).nonzero()[:, 0]
    by_class = sound[torch.argsort(labels[sound], stable=True)]
    counts = torch.bincount(labels[sound], minlength=int(labels.max()) + 1)
    starts = torch.cumsum(counts, 0) - counts
    bits = hash_bits(seed, epoch, samples[at], Stream.REPLACEMENT)
    replaced = samples.clone()
    for place, label, own in zip(at.tolist(), labels[samples[at]].tolist(), bits, strict=True):
        count = int(counts[label])
        chosen = by_class[starts[label] :][:count] if count else sound
        replaced[place] = chosen[integers(own, len(chosen))]
    return replaced
