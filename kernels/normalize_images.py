"""uint8 images to normalised floating point, with crop and flip in the same pass.

    y[n, c, i, j] = raw[n, i', j', c] * scale[c] + shift[c]
    scale = 1 / (255 std),  shift = -mean / std

In the order of the data pipeline: pad with raw zeros (black, before normalisation), crop H x W at
the offset, flip left to right, normalise; these steps put pixel (i', j') at (i, j).

In:     images uint8 [N, H, W, 3]; crop offsets int64 [N, 2]; flip bool [N].
Out:    [N, 3, H, W] in channels_last; bf16, fp16, fp32 or fp64. Computes in fp32, for fp64 in fp64.
Moves:  N H W 3 bytes read, N H W 3 elements of the output written.
FLOPs:  2 N H W 3.
Not supported: channels other than 3; a gradient (towards mean and std).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import Call, choose_at, decide_at, is_measuring

Crop = tuple[int, Tensor]
Channels = Sequence[float] | Tensor  # three values

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normalize_images_reference(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    padding: int,
    offsets: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """Eager PyTorch: the specification, the oracle of the tests and the fallback."""
    if offsets is not None or flip is not None:
        images = _crop_and_flip(images, padding, offsets, flip)
    values = images.permute(0, 3, 1, 2).to(scale.dtype)  # [N, 3, H, W], still NHWC in memory
    values = values * scale[:, None, None] + shift[:, None, None]
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def _crop_and_flip(
    images: Tensor, padding: int, offsets: Tensor | None, flip: Tensor | None
) -> Tensor:
    count, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device).expand(count, height)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    if offsets is not None:
        images = F.pad(images, (0, 0, padding, padding, padding, padding))
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    sample = torch.arange(count, device=images.device)
    return images[sample[:, None, None], rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]


# The operator of the fused backends: csrc/normalize_images.cpp implements it for CPU, Triton for
# CUDA. The second one, for CUDA alone, takes scale and shift as numbers, which then need not be
# brought there.
torch.library.define(
    "dfptkd::normalize_images",
    "(Tensor images, Tensor scale, Tensor shift, ScalarType dtype, int padding, Tensor? offsets, "
    "Tensor? flip) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "dfptkd::normalize_images_numbers",
    "(Tensor images, float[] scale, float[] shift, ScalarType dtype, int padding, Tensor? offsets, "
    "Tensor? flip) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("dfptkd::normalize_images")
@torch.library.register_fake("dfptkd::normalize_images_numbers")
def _(
    images: Tensor,
    scale: Channels,
    shift: Channels,
    dtype: torch.dtype,
    padding: int,
    offsets: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    count, height, width, channels = images.shape
    return torch.empty(
        (count, channels, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )


def _triton(*inputs: Any) -> Tensor:
    from .normalize_images_triton import launch

    return launch(*inputs)


torch.library.impl("dfptkd::normalize_images", "cuda", _triton)
torch.library.impl("dfptkd::normalize_images_numbers", "cuda", _triton)


def normalize_images(
    images: Tensor,
    mean: Channels,
    std: Channels,
    *,
    dtype: torch.dtype,
    crop: Crop | None = None,
    flip: Tensor | None = None,
) -> Tensor:
    """Pads, crops, flips and normalises a batch of images.

    Args:
        images: uint8 [N, H, W, 3], 0..255.
        mean: three channel means in units of 0..1; numbers, or a tensor on the device of images.
            Nothing is copied from the host either way, so a CUDA graph can capture the call; of
            numbers the Triton backend makes one launch, of tensors a few small ones more.
        std: three channel standard deviations in units of 0..1, likewise.
        dtype: floating dtype of the result.
        crop: (padding, offsets): zeros added on every side, in pixels, and int64 [N, 2] with (top,
            left) of the window in the padded image, 0..2 * padding. Absent: no crop.
        flip: bool [N], images to mirror left to right. Absent: none.

    Returns:
        [N, 3, H, W] of `dtype`, channels_last.

    Raises:
        ValueError: A shape, dtype, device or value is wrong. Values of offsets are checked on a
            CPU only, since a look at them would stop a GPU, and not in compiled code; the fused
            backends check them there too, on a GPU by a device assertion.
    """
    padding, offsets = (0, None) if crop is None else crop
    _check(images, dtype, padding, offsets, flip)
    scale, shift = _affine(mean, std, images.device)
    words = ("crop",) * (offsets is not None) + ("flip",) * (flip is not None)
    at = ("normalize_images", images, images.shape[1:3], words, dtype)
    if is_measuring():
        call, exact = (
            functools.partial(_again, mean, std, padding, work) for work in (dtype, torch.float64)
        )
        backend = decide_at(Call(call, (images, offsets, flip), exact), *at)
    else:
        backend = choose_at(*at)
    if backend != "triton" or isinstance(scale, Tensor):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift = (_as_tensor(v, images.device).to(work) for v in (scale, shift))
    if backend == "reference":
        return normalize_images_reference(images, scale, shift, dtype, padding, offsets, flip)
    # What torch.library adds in Python takes longer than the launch for a small batch.
    if backend == "triton" and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()):
        return _triton(images, scale, shift, dtype, padding, offsets, flip)
    operators = torch.ops.dfptkd
    if isinstance(scale, Tensor):
        return operators.normalize_images(images, scale, shift, dtype, padding, offsets, flip)
    return operators.normalize_images_numbers(images, scale, shift, dtype, padding, offsets, flip)


def _again(
    mean: Channels,
    std: Channels,
    padding: int,
    dtype: torch.dtype,
    images: Tensor,
    offsets: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    crop = None if offsets is None else (padding, offsets)
    return normalize_images(images, mean, std, dtype=dtype, crop=crop, flip=flip)


def _affine(mean: Channels, std: Channels, device: torch.device) -> tuple[Any, Any]:
    """scale and shift in fp64: lists where mean and std are numbers, else tensors [3]."""
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        mean, std = (
            _checked(name, _as_tensor(values, device), device)
            for name, values in (("mean", mean), ("std", std))
        )
        return 1 / (255 * std), -mean / std
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std: expected 3 numbers each, std above 0, got {mean}, {std}")
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _as_tensor(values: Channels, device: torch.device) -> Tensor:
    """fp64, made on the device: a CUDA graph cannot capture a copy from the host."""
    if isinstance(values, Tensor):
        return values.detach().to(torch.float64)
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.float64)
    return torch.stack([torch.full((), v, dtype=torch.float64, device=device) for v in values])


def _checked(name: str, values: Tensor, device: torch.device) -> Tensor:
    if values.shape != (3,) or values.device != device:
        raise ValueError(
            f"{name}: expected 3 values on {device}, got {list(values.shape)} on {values.device}"
        )
    return values


def _check(
    images: Tensor, dtype: torch.dtype, padding: int, offsets: Tensor | None, flip: Tensor | None
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if dtype not in _FLOATING:
        raise ValueError(f"dtype: expected a floating dtype of 16, 32 or 64 bits, got {dtype}")
    count = images.shape[0]
    if offsets is not None:
        _check_side_input("crop offsets", offsets, torch.int64, (count, 2), images.device)
        if padding < 0:
            raise ValueError(f"crop padding: expected 0 or more, got {padding}")
        # Values on a GPU would cost a host sync, values in a graph cannot be branched on.
        if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and count > 0:
            low, high = (int(v) for v in offsets.aminmax())
            if low < 0 or high > 2 * padding:
                raise ValueError(
                    f"crop offsets: expected 0..{2 * padding} for padding {padding}, "
                    f"got {low}..{high}"
                )
    if flip is not None:
        _check_side_input("flip", flip, torch.bool, (count,), images.device)


def _check_side_input(
    name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if value.dtype != dtype or value.shape != shape or value.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )
