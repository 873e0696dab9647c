"""A bounded look into the files of a split: which data these are, and how large their images.

All names and labels count, and the bytes of some files that are spread evenly over the split: a
million files would take minutes to read, or days over a network. Where the files lie, in which
order, and whether in folders or in tar files makes no difference.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import DataError
from .image_files import ImageFiles

LOOKED_AT = 256  # files of a split


@dataclass(frozen=True)
class Look:
    """The result of `look_into`."""

    content: str
    """SHA-256 of the labels and file names of all images, and of the bytes of those looked at."""
    sizes: list[tuple[int, int]]
    """Height and width of each image looked at that says how large it is."""


def look_into(files: ImageFiles) -> Look:
    """Look into the files of a whole split.

    A file that cannot be read counts as one without bytes.
    """
    names = [name.rpartition(b"/")[2] for name in files.names.tolist()]
    labels = files.labels.tolist()
    keys = [b"%08d/%b" % known for known in zip(labels, names, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    digest = hashlib.sha256(b"\0".join(keys[sample] for sample in order))
    sizes = []
    count = min(len(order), LOOKED_AT)
    for place in np.linspace(0, len(order) - 1, count).round().astype(int).tolist():
        try:
            data = files.read(order[place])
        except DataError:
            data = b""
        digest.update(hashlib.sha256(data).digest())
        if (size := _size(data)) is not None:
            sizes.append(size)
    return Look(digest.hexdigest(), sizes)


def _size(data: bytes) -> tuple[int, int] | None:
    """Height and width by an image's header; None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
    except Exception:  # Pillow's decoders raise nearly anything on a damaged file
        return None
