"""Image files that make trouble, and those that only look like it."""

import io

import numpy as np
from PIL import Image


def picture(seed=0, size=(48, 64)):
    """A smooth RGB image, so that JPEG keeps it; size is height, width."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize(size[::-1], Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    """The image as bytes of a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def broken_files():
    """Name -> bytes of files that no decoder can read."""
    jpeg, png = encoded(picture(), quality=90), encoded(picture(), "PNG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "zeros.png": bytes(5000),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "header_only.jpg": jpeg[:300],
        "half.png": png[: len(png) // 2],
        "no_start.jpg": jpeg[100:],
    }


def odd_files():
    """Name -> bytes of files that are unusual and decode."""
    rgb = picture()
    deep = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)
    frames = [picture(1), picture(2)]
    return {
        "cmyk.jpg": encoded(rgb.convert("CMYK")),
        "deep.png": encoded(deep, "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "wrong.png": encoded(rgb),
        "grey.jpg": encoded(rgb.convert("L")),
        "palette.png": encoded(rgb.convert("P"), "PNG"),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "progressive.jpg": encoded(rgb, progressive=True),
        "picture.webp": encoded(rgb, "WEBP"),
        "picture.bmp": encoded(rgb, "BMP"),
    }


def write_folder(root, train=6, val=4, classes=("ant", "bee")):
    """A sound image folder; returns the paths of its training images, class by class."""
    paths = []
    for split, count in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                path = folder / f"{i}.jpg"
                path.write_bytes(encoded(picture(100 * c + i, (40 + i, 60 - i)), quality=92))
                if split == "train":
                    paths.append(path)
    return paths
