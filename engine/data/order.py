"""Sample order and augmentation as a pure function of (seed, epoch, sample), without any state.

A draw is 64 hashed bits of (seed, epoch, stream, counter): the finaliser of SplitMix64
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) over a keyed
Weyl sequence,

    key  = fold of mix over seed, epoch and stream
    bits = mix(key + counter * 0x9E3779B97F4A7C15)   (mod 2**64)

written in wrapping int64 arithmetic. Integers have no rounding, so every device, library version,
number of workers and number of ranks draws the same bits, and a run resumes at any step without
replay.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """What a draw is for; streams of one (seed, epoch) are independent of each other.

    The numbers are part of the sample order of every run on disk: never change one.
    """

    ORDER = 0
    CROP_ROW = 1
    CROP_COLUMN = 2
    FLIP = 3
    RESIZED_CROP = 4
    SYNTHETIC_LABEL = 5
    SYNTHETIC_PIXELS = 6
    SYNTHETIC_COLOUR = 7
    REPLACEMENT = 8
    NEGATIVE = 9


def hash_bits(seed: int, epoch: int, ids: Tensor, stream: int) -> Tensor:
    """64 random bits for each counter in `ids`.

    Args:
        seed: seed of the run, 0 or more.
        epoch: epoch from 0.
        ids: int64, any shape: sample numbers or other counters.
        stream: what the bits are for, see `Stream`.

    Returns:
        int64 of the shape of `ids`, on its device; all 64 bits are uniform, the sign included.
    """
    key = 0
    for part in (seed, epoch, int(stream)):
        key = _mix_int((key ^ part) + _WEYL)
    x = ids * _signed(_WEYL) + _signed(key)
    x = _xor_shift(x, 30) * _signed(_MULTIPLIER_1)
    x = _xor_shift(x, 27) * _signed(_MULTIPLIER_2)
    return _xor_shift(x, 31)


def uniforms(bits: Tensor) -> Tensor:
    """Hashed bits as float64 in [0, 1): their upper 53 bits, exactly."""
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def integers(bits: Tensor, below: int | Tensor) -> Tensor:
    """Hashed bits as int64 in [0, below); `below` under 2**31, the bias is under below / 2**31;
    a tensor of several bounds is broadcast."""
    return (((bits >> 33) & ((1 << 31) - 1)) * below) >> 31


def epoch_order(
    seed: int, epoch: int, num_samples: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The order in which an epoch visits the samples.

    Returns:
        int64 [N], a permutation of 0..N-1: the stable argsort of the samples' hashes.
    """
    ids = torch.arange(num_samples, device=device)
    return torch.argsort(hash_bits(seed, epoch, ids, Stream.ORDER), stable=True)


def crop_offsets(seed: int, epoch: int, ids: Tensor, padding: int) -> Tensor:
    """Where the crop window starts in an image padded on every side.

    Args:
        ids: int64 [B], sample numbers.
        padding: pixels added on every side.

    Returns:
        int64 [B, 2]: row and column, each uniform in 0..2 * padding; `padding` is the image itself.
    """
    choices = 2 * padding + 1
    rows = integers(hash_bits(seed, epoch, ids, Stream.CROP_ROW), choices)
    columns = integers(hash_bits(seed, epoch, ids, Stream.CROP_COLUMN), choices)
    return torch.stack((rows, columns), dim=-1)


def flips(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Which samples are mirrored left to right: bool of the shape of `ids`, half of them true."""
    return hash_bits(seed, epoch, ids, Stream.FLIP) < 0


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _xor_shift(x: Tensor, shift: int) -> Tensor:
    # int64 shifts drag the sign along; the mask turns that into a shift of unsigned numbers
    return x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))


def _mix_int(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _MASK
    return x ^ (x >> 31)
