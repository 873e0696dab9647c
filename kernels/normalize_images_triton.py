"""Triton backend of `normalize_images`; the equations stand in normalize_images.py.

Images and result are both NHWC in memory. A program writes BLOCK elements in a row of one image,
each from the byte that crop and flip put there; what they put there from outside the image is
padding, so that no offset reads out of bounds.

A thread has a CHUNK of elements in a row, which no line of the image ends within. Line, place and
channel are worked out for its first element alone, with integer divisions, and the others follow by
constants. One image is less than 2^31 bytes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import TRITON_NAME, AotCase, aot_case

_LAUNCH = {
    # 16 bytes a thread. 32 x 32 and 224 x 224 pixels are whole programs. Not tuned on a GPU yet.
    "BLOCK": 1024,
    "num_warps": 2,
    # Product and sum are rounded one by one, as PyTorch does it.
    "enable_fp_fusion": False,
    # Keeps the assertion on offsets, and would bring overflow checks with it.
    "debug": True,
    "sanitize_overflow": False,
}
_NUMBERS = ("red_scale", "green_scale", "blue_scale", "red_shift", "green_shift", "blue_shift")


@triton.jit
def _of_channel(channel, step, ptr, red, green, blue):
    """Of three values, numbers or at `ptr`, that of (channel + step) % 3; both in 0..2."""
    if ptr is not None:
        red, green, blue = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    # One choice a chunk. `step` is a constant of each element, so its choice is none at run time.
    first = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    second = tl.where(channel == 0, green, tl.where(channel == 1, blue, red))
    third = tl.where(channel == 0, blue, tl.where(channel == 1, red, green))
    return tl.where(step == 0, first, tl.where(step == 1, second, third))


@triton.jit(do_not_specialize=["padding"])
def normalize_kernel(
    images_ptr, out_ptr, offsets_ptr, flip_ptr, padding: tl.int32, scale_ptr, shift_ptr,
    red_scale, green_scale, blue_scale, red_shift, green_shift, blue_shift,
    H: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row: tl.constexpr = 3 * W
    tiles: tl.constexpr = (H * row + BLOCK - 1) // BLOCK
    image = tl.program_id(0) // tiles
    begin = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK // CHUNK)[:, None] * CHUNK
    follow = tl.arange(0, CHUNK)[None, :]
    channel, step = begin % 3, follow % 3
    element = begin + follow
    valid = element < H * row

    source, inside = element, valid
    if offsets_ptr is not None or flip_ptr is not None:
        line, byte = begin // row, begin % row + follow
        if flip_ptr is not None:
            own = channel + step
            own = tl.where(own >= 3, own - 3, own)  # the channel of each element
            byte = tl.where(tl.load(flip_ptr + image), row - 3 - byte + 2 * own, byte)
        if offsets_ptr is not None:
            top, left = tl.load(offsets_ptr + 2 * image), tl.load(offsets_ptr + 2 * image + 1)
            known = (top >= 0) & (top <= 2 * padding) & (left >= 0) & (left <= 2 * padding)
            tl.device_assert(known, "dfptkd: crop offset out of range")
            line += top.to(tl.int32) - padding
            byte += 3 * (left.to(tl.int32) - padding)
            inside = valid & ((line >= 0) & (line < H)) & (byte >= 0) & (byte < row)
        source = line * row + byte

    first = image.to(tl.int64) * (H * row)
    raw = tl.load(images_ptr + first + source, mask=inside, other=0).to(tl.float32)
    scale = _of_channel(channel, step, scale_ptr, red_scale, green_scale, blue_scale)
    shift = _of_channel(channel, step, shift_ptr, red_shift, green_shift, blue_shift)
    y = (raw * scale + shift).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + element, y, mask=valid)


def launch(
    images: Tensor,
    scale: Tensor | Sequence[float],
    shift: Tensor | Sequence[float],
    dtype: torch.dtype,
    padding: int,
    offsets: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """[N, 3, H, W] in channels_last by one launch; no checks, no host sync, no copy from the host.

    Args:
        images: uint8 [N, H, W, 3].
        scale, shift: fp32 [3] on the device, or three numbers.
        dtype: bf16, fp16 or fp32.
        padding, offsets, flip: As in the reference. Offsets out of range fail a device assertion.
    """
    count, height, width, _ = images.shape
    out = torch.empty(
        (count, 3, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    if out.numel() == 0:
        return out
    channels: dict[str, Any]
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        channels = dict.fromkeys(_NUMBERS)
        channels |= {"scale_ptr": scale.contiguous(), "shift_ptr": shift.contiguous()}
    else:
        channels = dict(zip(_NUMBERS, map(float, (*scale, *shift)), strict=True))
        channels |= {"scale_ptr": None, "shift_ptr": None}
    constants = _constants(height, width, dtype, offsets is not None or flip is not None)
    with torch.cuda.device_of(images):
        normalize_kernel[(count * triton.cdiv(3 * height * width, _LAUNCH["BLOCK"]),)](
            images.contiguous(),
            out,
            None if offsets is None else offsets.contiguous(),
            None if flip is None else flip.contiguous(),
            padding,
            **channels,
            **constants,
        )
    return out


def _constants(height: int, width: int, dtype: torch.dtype, is_moved: bool) -> dict[str, Any]:
    """Constants and options of a launch.

    A chunk is one 16-byte load of an image that stays as it is. Bytes that move are loaded one by
    one; there a chunk is one 16-byte store.
    """
    chunk = math.gcd(3 * width, 16 // dtype.itemsize if is_moved else 16)
    return {"H": height, "W": width, "CHUNK": chunk, **_LAUNCH}


def aot_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    """Launches for one dtype: two image sizes of the recipes and an odd one, all that can move.

    Args:
        dtype: Of the result; bf16, fp16 or fp32.
    """
    types = {
        "images_ptr": "*u8",
        "out_ptr": "*" + TRITON_NAME[dtype],
        "offsets_ptr": "*i64",
        "flip_ptr": "*u1",
        "scale_ptr": "*fp32",
        "shift_ptr": "*fp32",
        **dict.fromkeys(_NUMBERS, "fp32"),
    }
    numbers = {"scale_ptr": None, "shift_ptr": None}
    tensors = dict.fromkeys(_NUMBERS)
    stays = {"offsets_ptr": None, "flip_ptr": None}
    for height, width, absent, what in (
        (32, 32, numbers, "crop flip"),
        (32, 32, tensors, "crop flip tensors"),
        (32, 32, stays | numbers, "plain"),
        (224, 224, numbers, "crop flip"),
        (224, 224, {"offsets_ptr": None} | numbers, "flip"),
        (224, 224, {"flip_ptr": None} | numbers, "crop"),
        (224, 224, stays | numbers, "plain"),
        (224, 224, stays | tensors, "plain tensors"),
        (33, 17, numbers, "crop flip"),
    ):
        is_plain = what.startswith("plain")
        wide = "v4.b32" if width % 16 == 0 else None
        yield aot_case(
            f"normalize {height}x{width} {what}",
            normalize_kernel,
            types,
            absent | _constants(height, width, dtype, not is_plain),
            max_registers=48
            if wide
            else 80,  # 1365 threads of the 2048 of a multiprocessor, or 819
            load=wide if is_plain else None,
            store=wide,
        )
