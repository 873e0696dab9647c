"""Sizes out of headers: Pillow's on plain files, None on odd ones, never an exception."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfptkd.engine.data.header import plain_size


def encoded(format_name, mode="RGB", size=(41, 23), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format_name, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[274] = 6  # orientation

PLAIN = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "4:4:4": encoded("JPEG", subsampling="4:4:4"),
    "4:2:2": encoded("JPEG", subsampling="4:2:2"),
    "grey": encoded("JPEG", "L"),
    "restarts": encoded("JPEG", restart_marker_blocks=1),
    "exif": encoded("JPEG", exif=EXIF),
    "comment": encoded("JPEG", comment=b"\xff\xda" * 9),
    "png": encoded("PNG"),
    "grey png": encoded("PNG", "L"),
}
ODD = {
    "cmyk": encoded("JPEG", "CMYK"),
    "rgb jpeg": encoded("JPEG", keep_rgb=True),
    "rgba png": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P"),
    "1 bit": encoded("PNG", "1"),
    "16 bits": encoded("PNG", "I;16"),
    "key colour": encoded("PNG", transparency=(1, 2, 3)),
    "animated": encoded("PNG", save_all=True, append_images=[Image.new("RGB", (41, 23))]),
    "gif": encoded("GIF"),
    "webp": encoded("WEBP"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "empty": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_have_pillows_size(name):
    assert plain_size(PLAIN[name]) == (23, 41)


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_pillow(name):
    assert plain_size(ODD[name]) is None


@pytest.mark.parametrize("code", [0xC3, 0xC5, 0xC9, 0xCA])
def test_frames_that_are_not_huffman_coded_pictures_are_left_to_pillow(code):
    data = PLAIN["jpeg"]
    at = data.index(b"\xff\xc0")
    assert plain_size(data[:at] + bytes((0xFF, code)) + data[at + 2 :]) is None


@pytest.mark.parametrize("precision", [12, 16])
def test_deep_jpegs_are_left_to_pillow(precision):
    data = bytearray(PLAIN["jpeg"])
    data[data.index(b"\xff\xc0") + 4] = precision
    assert plain_size(bytes(data)) is None


def test_the_height_of_a_later_segment_is_left_to_pillow():
    data = bytearray(PLAIN["jpeg"])
    struct.pack_into(">H", data, data.index(b"\xff\xc0") + 5, 0)
    assert plain_size(bytes(data)) is None


def test_photographs(shared_data):
    paths = sorted((shared_data / "jpeg-sample").glob("*/*"))
    assert len(paths) == 200
    for path in paths:
        width, height = Image.open(path).size
        assert plain_size(path.read_bytes()) == (height, width)


@pytest.mark.parametrize("name", PLAIN)
def test_every_cut_file_is_left_to_pillow(name):
    data = PLAIN[name]
    assert all(plain_size(data[:end]) is None for end in range(len(data)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing(data):
    whole = bytearray(data.draw(st.sampled_from([*PLAIN.values(), *ODD.values()])))
    for _ in range(data.draw(st.integers(1, 8))):
        if whole:
            # mostly in the header, where the bytes are read
            at = data.draw(st.integers(0, min(len(whole), 700) - 1))
            whole[at] = data.draw(st.integers(0, 255))
    size = plain_size(bytes(whole))
    assert size is None or (len(size) == 2 and min(size) > 0)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8", PLAIN["png"][:8], PLAIN["png"][:33]]),
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd9", PLAIN["png"][-12:]]),
)
def test_garbage_raises_nothing(start, middle, end):
    size = plain_size(start + middle + end)
    assert size is None or min(size) > 0
