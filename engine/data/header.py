"""Height and width out of the first bytes of an image, where every decoder makes the same of it.

A decoder that must know where to cut before it decodes needs the size, and costs more to open than
these few bytes. Whatever is unusual is answered with None, and then decoded by Pillow.
"""

from __future__ import annotations

import struct

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_ODD = (b"tRNS", b"acTL", b"PLTE")  # transparency, animation, suggested palette
_ADOBE_YCC = 1  # transform of an Adobe segment: YCbCr
_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman: baseline, extended, progressive
_TABLES = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # with applications' data and comments
_START_OF_SCAN = 0xDA
_SAMPLINGS = (b"\x11", b"\x21", b"\x12", b"\x22")  # of the luma, against chroma of 1x1


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an image that every decoder handles alike.

    That is a JPEG of 8 bits, Huffman coded, grey or YCbCr, or a PNG of 8 bits, grey or RGB, without
    transparency or animation, whose last bytes are those of a whole file.

    Args:
        data: The encoded image; any bytes.

    Returns:
        Pixels; None for anything else.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg_size(data)
        if data[:8] == _PNG_START:
            return _png_size(data)
    except (struct.error, IndexError):  # ends within its header
        pass
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if data[-2:] != b"\xff\xd9":
        return None  # cut off, or followed by something
    at, size, ids, jfif, adobe = 2, None, b"", False, None
    while True:
        mark, code, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or length < 2:
            return None
        if code == _START_OF_SCAN:
            break
        if code in _FRAMES and size is None:
            size, ids = _frame_size(data, at), data[at + 10 : at + 2 + length : 3]
            if size is None:
                return None
        elif code not in _TABLES:
            return None  # arithmetic, lossless, hierarchical, or no JPEG at all
        elif code == 0xE0 and data[at + 4 : at + 9] == b"JFIF\0":
            jfif = True
        elif code == 0xEE and data[at + 4 : at + 9] == b"Adobe":
            adobe = data[at + 15]
        at += 2 + length
    # where neither JFIF nor Adobe says which colours these are, the components' names would
    is_ycc = jfif if adobe is None else adobe == _ADOBE_YCC
    return size if len(ids) == 1 or is_ycc or ids == b"\1\2\3" else None


def _frame_size(data: bytes, at: int) -> tuple[int, int] | None:
    """Of the frame header at byte `at`; None if its frame is unusual."""
    length, precision, height, width, components = struct.unpack_from(">HBHHB", data, at + 2)
    if precision != 8 or components not in (1, 3) or length != 8 + 3 * components:
        return None
    if not (height and width):
        return None
    samplings = [data[at + 11 + 3 * c : at + 12 + 3 * c] for c in range(components)]
    if samplings[0] not in _SAMPLINGS or any(s != b"\x11" for s in samplings[1:]):
        return None
    return height, width


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[-12:] != _PNG_END:
        return None
    length, kind, width, height, depth, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if (length, kind, depth) != (13, b"IHDR", 8) or colour not in (0, 2):
        return None
    at = 33
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in _PNG_ODD:
            return None
        if kind == b"IDAT":
            return (height, width) if height and width else None
        at += 12 + length
