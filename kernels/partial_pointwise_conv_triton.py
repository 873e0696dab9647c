"""Triton backend of `partial_pointwise_conv` and `affine_relu`.

The equations stand in partial_pointwise_conv.py and batch_norm.py. Activations are matrices
[P, C] of P = N H W pixels, which is what channels_last memory is; IN = C / groups and
OUT = C_out / groups are the channels of a group.

A program has BLOCK_M pixels and a block of one group's channels. The k x k convolution of c_p
channels is a matrix product too: its inner index runs over taps and channels together, so that
even c_p = 2 fills the matrix instructions. Where it ends, a program of the forward has h with the
touched channels replaced, in registers, and goes on with the 1x1.

The backward forms g, the whole gradient of y, wherever it reads grad_y, and takes five kernels:

    dh2 = g W            done with channels >= c_p; the others go on as a matrix [P, c_p] to the
    dh  = conv^T(dh2)    transposed convolution, which finishes them
    z   = conv(h)        again: [P, c_p], not kept from the forward
    dW  = g^T h2         and
    dWp = dh2^T h        in splits of the pixels

Sums over pixels go to memory as one row a program and are added up by `sum_rows_kernel`: no
atomics, so that the same launch gives the same bits. Dots accumulate in fp32. fp32 operands are
rounded to TF32 where torch.backends.cudnn.conv.fp32_precision lets a convolution of PyTorch do so.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import TRITON_NAME, AotCase, aot_case, shared_alignment

# The interpreter's dot is wrong on bf16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# A new batch or image size is no reason to compile again.
_INTEGERS = ("pixels", "height", "width", "span", "rows", "columns", "first_columns")


# Tiles
# -----------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _affine(x, scale_ptr, shift_ptr, channel, C: tl.constexpr):
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    return x


@triton.jit
def _activation(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, pixel, channel, valid,
    C: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """h of these pixels and channels in x's dtype, 0 where not valid."""
    offset = pixel.to(tl.int64) * C + channel
    h = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    h = _affine(h, scale_ptr, shift_ptr, channel, C)
    if RELU:
        h = tl.where(h <= 0.0, 0.0, h)  # NaN stays
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, h, 0.0).to(x_ptr.dtype.element_ty)


@triton.jit
def _upstream(
    grad_y_ptr, y_ptr, grad_sums_ptr, grad_squares_ptr, pixel, channel, valid, C_OUT: tl.constexpr
):
    """g: what reaches y directly and through its sums, 0 where not valid."""
    offset = pixel.to(tl.int64) * C_OUT + channel
    g = tl.load(grad_y_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    if grad_sums_ptr is not None:
        g += tl.load(grad_sums_ptr + channel, mask=channel < C_OUT, other=0.0)
    if grad_squares_ptr is not None:
        y = tl.load(y_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        g += 2.0 * y * tl.load(grad_squares_ptr + channel, mask=channel < C_OUT, other=0.0)
    return tl.where(valid, g, 0.0).to(grad_y_ptr.dtype.element_ty)


@triton.jit
def _taps(
    index, pixel, pixels, height, width, CP: tl.constexpr, K: tl.constexpr, SIGN: tl.constexpr
):
    """What (tap, channel) number `index` of each pixel reads: pixel, channel, whether it is there.

    Args:
        index: [1, T], tap * CP + channel.
        pixel: [M, 1].
        SIGN: 1, or -1 for the transposed convolution.
    """
    tap = index // CP
    down, right = SIGN * (tap // K - K // 2), SIGN * (tap % K - K // 2)
    line, column = pixel // width % height + down, pixel % width + right
    inside = (line >= 0) & (line < height) & (column >= 0) & (column < width)
    valid = inside & (index < K * K * CP) & (pixel < pixels)
    return pixel + down * width + right, index % CP, valid


@triton.jit
def _convolved(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, weight_ptr, pixel, out, pixels, height, width,
    C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Channels `out` [P] of the convolution of h[:, :CP] at `pixel` [M]: fp32 [M, P].

    `weight` is [K K, CP read, CP written] as the forward has it; the transposed convolution takes
    the last two the other way round.
    """
    acc = tl.zeros((pixel.shape[0], out.shape[0]), tl.float32)
    for start in range(0, K * K * CP, BLOCK_T):
        index = start + tl.arange(0, BLOCK_T)
        source, channel, valid = _taps(
            index[None, :], pixel[:, None], pixels, height, width, CP, K, SIGN
        )
        h = _activation(x_ptr, residual_ptr, scale_ptr, shift_ptr, source, channel, valid, C, RELU)
        known = (index < K * K * CP)[:, None] & (out < CP)[None, :]
        if SIGN > 0:
            place = index[:, None] * CP + out[None, :]
        else:
            place = ((index // CP * CP)[:, None] + out[None, :]) * CP + (index % CP)[:, None]
        weight = tl.load(weight_ptr + place, mask=known, other=0.0)
        acc = _dot(h, weight, acc, PRECISION)
    return acc


@triton.jit
def _place(SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile of pixels, group, and channels [BLOCK_N] of this program within its group of SIZE.

    Programs of the same pixels are neighbors: they find them in the cache.
    """
    blocks: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) % (GROUPS * blocks)
    tile = tl.program_id(0) // (GROUPS * blocks)
    group = block // blocks if GROUPS > 1 else 0
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile, pixel, group, block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _store_sums(sums_ptr, tile, channel, valid, first, second, CHANNELS: tl.constexpr):
    """One row [2 CHANNELS] a tile: sums over its pixels of two matrices."""
    row = sums_ptr + tile.to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(row, tl.sum(first, 0), mask=valid)
    tl.store(row + CHANNELS, tl.sum(second, 0), mask=valid)


@triton.jit
def _store_input_gradients(
    dh, x_ptr, scale_ptr, shift_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
    tile, pixel, channel, pixels, valid, C: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """From dh [M, N], 0 beyond the last pixel, to the gradients of x, residual, scale and shift.

    Args:
        channel: [N].
        valid: [N], channels that are to be stored.
        sums_ptr: One row a tile for grad_scale and grad_shift, or None.
    """
    offset = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    stored = (pixel < pixels)[:, None] & valid[None, :]
    if grad_residual_ptr is not None:
        dtype: tl.constexpr = grad_residual_ptr.dtype.element_ty
        tl.store(grad_residual_ptr + offset, dh.to(dtype), mask=stored)
    if grad_x_ptr is not None:
        if RELU or sums_ptr is not None:
            x = tl.load(x_ptr + offset, mask=stored, other=0.0).to(tl.float32)
        if RELU:
            dh = tl.where(_affine(x, scale_ptr, shift_ptr, channel[None, :], C) > 0.0, dh, 0.0)
        if sums_ptr is not None:
            _store_sums(sums_ptr, tile, channel, valid, dh * x, dh, C)
        dx = _affine(dh, scale_ptr, None, channel[None, :], C)
        tl.store(grad_x_ptr + offset, dx.to(grad_x_ptr.dtype.element_ty), mask=stored)


# Forward
# -----------------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    x_ptr,  # [P, C], like residual
    residual_ptr,
    scale_ptr,  # [C], like shift
    shift_ptr,
    partial_ptr,  # [K K, CP, CP]
    point_ptr,  # [C_OUT, IN]
    y_ptr,  # [P, C_OUT]
    sums_ptr,  # fp32 [tiles, 2 C_OUT]
    pixels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    CP: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    IN: tl.constexpr = C // GROUPS
    OUT: tl.constexpr = C_OUT // GROUPS
    tile, pixel, group, column = _place(OUT, GROUPS, BLOCK_M, BLOCK_N)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    out = group * OUT + column
    point_row = point_ptr + out[None, :] * IN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if CP > 0:
        # The touched channels of this group; a convolution reads all CP, whatever their groups.
        touched = tl.minimum(CP - group * IN, IN)
        for start in range(0, touched, BLOCK_P):
            k = start + tl.arange(0, BLOCK_P)
            z = _convolved(
                x_ptr, residual_ptr, scale_ptr, shift_ptr, partial_ptr, pixel, group * IN + k,
                pixels, height, width, C, CP, K, RELU, 1, PRECISION, BLOCK_T,
            ).to(dtype)  # fmt: skip
            known = (k < touched)[:, None] & (column < OUT)[None, :]
            weight = tl.load(point_row + k[:, None], mask=known, other=0.0)
            acc = _dot(z, weight, acc, PRECISION)

    for start in range(CP // BLOCK_K * BLOCK_K if GROUPS == 1 else 0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = group * IN + k
        valid = (pixel < pixels)[:, None] & (k < IN)[None, :]
        h = _activation(
            x_ptr, residual_ptr, scale_ptr, shift_ptr, pixel[:, None], channel[None, :], valid,
            C, RELU,
        )  # fmt: skip
        # Not in the mask of the load, which would make it narrower.
        h = tl.where((channel >= CP)[None, :], h, 0.0)
        known = (k < IN)[:, None] & (column < OUT)[None, :]
        weight = tl.load(point_row + k[:, None], mask=known, other=0.0)
        acc = _dot(h, weight, acc, PRECISION)

    y = acc.to(dtype)
    stored = (pixel < pixels)[:, None] & (column < OUT)[None, :]
    tl.store(y_ptr + pixel.to(tl.int64)[:, None] * C_OUT + out[None, :], y, mask=stored)
    y = y.to(tl.float32)
    _store_sums(sums_ptr, tile, out, column < OUT, y, y * y, C_OUT)


@triton.jit(do_not_specialize=_INTEGERS)
def partial_conv_kernel(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, partial_ptr,
    z_ptr,  # [P, CP]
    pixels: tl.int32, height: tl.int32, width: tl.int32,
    C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The convolved channels alone, as the gradient of the point weight needs them."""
    _, pixel, _, out = _place(CP, 1, BLOCK_M, BLOCK_P)
    z = _convolved(
        x_ptr, residual_ptr, scale_ptr, shift_ptr, partial_ptr, pixel, out, pixels, height, width,
        C, CP, K, RELU, 1, PRECISION, BLOCK_T,
    )  # fmt: skip
    stored = (pixel < pixels)[:, None] & (out < CP)[None, :]
    offset = pixel.to(tl.int64)[:, None] * CP + out[None, :]
    tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=stored)


# Backward
# -----------------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def point_gradient_kernel(
    grad_y_ptr,  # [P, C_OUT], like y
    grad_sums_ptr,  # fp32 [C_OUT], like grad_squares
    grad_squares_ptr,
    y_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    point_ptr,
    grad_x_ptr,  # [P, C], like grad_residual
    grad_residual_ptr,
    dh2_ptr,  # [P, CP]
    sums_ptr,  # fp32 [tiles, 2 C]
    pixels: tl.int32,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    CP: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh2 = g W: done with channels >= CP, the others stored as they are."""
    IN: tl.constexpr = C // GROUPS
    OUT: tl.constexpr = C_OUT // GROUPS
    tile, pixel, group, column = _place(IN, GROUPS, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, OUT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        out = group * OUT + k
        valid = (pixel < pixels)[:, None] & (k < OUT)[None, :]
        g = _upstream(
            grad_y_ptr, y_ptr, grad_sums_ptr, grad_squares_ptr, pixel[:, None], out[None, :],
            valid, C_OUT,
        )  # fmt: skip
        known = (k < OUT)[:, None] & (column < IN)[None, :]
        weight = tl.load(point_ptr + out[:, None] * IN + column[None, :], mask=known, other=0.0)
        acc = _dot(g, weight, acc, PRECISION)

    channel = group * IN + column
    if CP > 0:
        touched = (pixel < pixels)[:, None] & ((column < IN) & (channel < CP))[None, :]
        offset = pixel.to(tl.int64)[:, None] * CP + channel[None, :]
        tl.store(dh2_ptr + offset, acc.to(dh2_ptr.dtype.element_ty), mask=touched)
    _store_input_gradients(
        acc, x_ptr, scale_ptr, shift_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
        tile, pixel, channel, pixels, (column < IN) & (channel >= CP), C, RELU,
    )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def partial_gradient_kernel(
    dh2_ptr,
    partial_ptr,  # [K K, CP, CP]
    x_ptr, scale_ptr, shift_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
    pixels: tl.int32, height: tl.int32, width: tl.int32,
    C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dh = conv^T(dh2) of the first CP channels."""
    tile, pixel, _, channel = _place(CP, 1, BLOCK_M, BLOCK_P)
    dh = _convolved(
        dh2_ptr, None, None, None, partial_ptr, pixel, channel, pixels, height, width,
        CP, CP, K, False, -1, PRECISION, BLOCK_T,
    )  # fmt: skip
    _store_input_gradients(
        dh, x_ptr, scale_ptr, shift_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
        tile, pixel, channel, pixels, channel < CP, C, RELU,
    )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def point_weight_kernel(
    grad_y_ptr,
    grad_sums_ptr,
    grad_squares_ptr,
    y_ptr,
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    z_ptr,  # [P, CP]
    rows_ptr,  # fp32 [splits, columns]
    pixels: tl.int32,
    span: tl.int32,  # pixels of a split
    columns: tl.int64,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    CP: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW = g^T h2 over one split: BLOCK_K outputs by BLOCK_N inputs."""
    IN: tl.constexpr = C // GROUPS
    OUT: tl.constexpr = C_OUT // GROUPS
    blocks: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    place, _, group, column = _place(IN, GROUPS, BLOCK_M, BLOCK_N)
    split = place // blocks
    row = place % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    out, channel = group * OUT + row, group * IN + column
    last = tl.minimum(split * span + span, pixels)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(split * span, last, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        g = _upstream(
            grad_y_ptr, y_ptr, grad_sums_ptr, grad_squares_ptr, pixel[:, None], out[None, :],
            (pixel < last)[:, None] & (row < OUT)[None, :], C_OUT,
        )  # fmt: skip
        valid = (pixel < last)[:, None] & (column < IN)[None, :]
        h = _activation(
            x_ptr, residual_ptr, scale_ptr, shift_ptr, pixel[:, None], channel[None, :], valid,
            C, RELU,
        )  # fmt: skip
        if CP > 0:
            touched = (channel < CP)[None, :]
            offset = pixel.to(tl.int64)[:, None] * CP + channel[None, :]
            z = tl.load(z_ptr + offset, mask=valid & touched, other=0.0)
            h = tl.where(touched, z, h)
        acc = _dot(tl.trans(g), h, acc, PRECISION)
    known = (row < OUT)[:, None] & (column < IN)[None, :]
    offset = split * columns + out[:, None] * IN + column[None, :]
    tl.store(rows_ptr + offset, acc, mask=known)


@triton.jit(do_not_specialize=_INTEGERS)
def partial_weight_kernel(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, dh2_ptr,
    rows_ptr,  # fp32 [splits, columns]; a row ends in the partial weight's gradient
    pixels: tl.int32, height: tl.int32, width: tl.int32, span: tl.int32,
    columns: tl.int64,
    C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dWp = h^T dh2 over one split: BLOCK_T taps and channels by BLOCK_P outputs."""
    TAPS: tl.constexpr = K * K
    blocks: tl.constexpr = (TAPS * CP + BLOCK_T - 1) // BLOCK_T
    place, _, _, out = _place(CP, 1, BLOCK_M, BLOCK_P)
    split = place // blocks
    index = place % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    last = tl.minimum(split * span + span, pixels)
    acc = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for start in range(split * span, last, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        source, channel, valid = _taps(
            index[None, :], pixel[:, None], last, height, width, CP, K, 1
        )
        h = _activation(x_ptr, residual_ptr, scale_ptr, shift_ptr, source, channel, valid, C, RELU)
        offset = pixel.to(tl.int64)[:, None] * CP + out[None, :]
        known = (pixel < last)[:, None] & (out < CP)[None, :]
        dh2 = tl.load(dh2_ptr + offset, mask=known, other=0.0)
        acc = _dot(tl.trans(h), dh2, acc, PRECISION)
    known = (index < TAPS * CP)[:, None] & (out < CP)[None, :]
    # In the weight's own order [out, in, tap], which the next kernel keeps.
    weight = (out[None, :] * CP + (index % CP)[:, None]) * TAPS + (index // CP)[:, None]
    row_ptr = rows_ptr + (split + 1) * columns - CP * CP * TAPS
    tl.store(row_ptr + weight, acc, mask=known)


@triton.jit(do_not_specialize=_INTEGERS)
def sum_rows_kernel(
    rows_ptr,  # fp32 [rows, columns]
    first_ptr,  # [splits, first_columns]: sums of the first columns over each split of the rows
    second_ptr,  # and of the others, of a single split; None: there are none
    rows: tl.int32,
    span: tl.int32,  # rows of a split
    columns: tl.int64,  # in units of ALIGN, for loads of 16 bytes; like first_columns
    first_columns: tl.int64,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    last = tl.minimum(split * span + span, rows)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * span, last, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = (row < last)[:, None] & (column < columns * ALIGN)[None, :]
        offset = row.to(tl.int64)[:, None] * (columns * ALIGN) + column[None, :]
        acc += tl.load(rows_ptr + offset, mask=valid, other=0.0)
    total = tl.sum(acc, 0)
    first = first_ptr + split.to(tl.int64) * (first_columns * ALIGN) + column
    is_first = column < first_columns * ALIGN
    tl.store(first, total.to(first_ptr.dtype.element_ty), mask=is_first)
    if second_ptr is not None:
        is_second = (column >= first_columns * ALIGN) & (column < columns * ALIGN)
        second = second_ptr + (column - first_columns * ALIGN)
        tl.store(second, total.to(second_ptr.dtype.element_ty), mask=is_second)


# A block's last normalization
# -----------------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def affine_relu_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, pixels: tl.int32,
    C: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    _, pixel, _, channel = _place(C, 1, BLOCK_M, BLOCK_N)
    valid = (pixel < pixels)[:, None] & (channel < C)[None, :]
    y = _activation(
        x_ptr, None, scale_ptr, shift_ptr, pixel[:, None], channel[None, :], valid, C, RELU
    )
    tl.store(y_ptr + pixel.to(tl.int64)[:, None] * C + channel[None, :], y, mask=valid)


@triton.jit(do_not_specialize=_INTEGERS)
def affine_relu_backward_kernel(
    grad_y_ptr, x_ptr, scale_ptr, shift_ptr, grad_x_ptr,
    sums_ptr,  # fp32 [tiles, 2 C]
    pixels: tl.int32,
    C: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, pixel, _, channel = _place(C, 1, BLOCK_M, BLOCK_N)
    valid = (pixel < pixels)[:, None] & (channel < C)[None, :]
    offset = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    grad_y = tl.load(grad_y_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    _store_input_gradients(
        grad_y, x_ptr, scale_ptr, shift_ptr, grad_x_ptr, None, sums_ptr,
        tile, pixel, channel, pixels, channel < C, C, RELU,
    )  # fmt: skip


# Launches
# -----------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What of a call a compiled kernel depends on, the dtype apart."""

    channels: int
    out_channels: int
    groups: int
    touched: int
    kernel: int
    relu: bool

    @property
    def depth(self) -> int:
        """Input channels of a group."""
        return self.channels // self.groups

    @property
    def width(self) -> int:
        """Output channels of a group."""
        return self.out_channels // self.groups

    def constants(self, *names: str) -> dict[str, int | bool]:
        """Those of these constants of the kernels."""
        values = {
            "C": self.channels,
            "C_OUT": self.out_channels,
            "GROUPS": self.groups,
            "CP": self.touched,
            "K": self.kernel,
            "RELU": self.relu,
        }
        return {name: values[name] for name in names}


# Pixels of a tile: with 4 warps the least that fills Hopper's matrix instructions. More warps and a
# loop over taps are compiled wrongly by Triton 3.6. Not tuned on a GPU yet.
_PIXELS = 64
_WARPS = {"num_warps": 4, "num_stages": 2}
# Left to itself, ptxas spills a few registers of an fp32 kernel to have one program more.
_MOST_REGISTERS_FP32 = 168
# Sums over all pixels are split among so many programs: what the registers of the largest kernel,
# 126 a thread, let a multiprocessor hold at once.
_PROGRAMS_A_PROCESSOR = 4
# Fewer pixels than this, and the sums of a split weigh more in memory than what they are made of.
_LEAST_SPAN = 128
# Multiprocessors of an H100 or H200, where there is no device to ask.
_USUAL_PROCESSORS = 132
# Rows and columns of a step of `sum_rows_kernel`, by the most rows and the most columns that it is
# for. Eight 16-byte loads a thread are under way together; with them the kernel waits for memory
# once a step, so that its time is that of its steps.
_SUM_TILES = ((64, None, (64, 128)), (None, 16, (512, 16)), (None, None, (256, 32)))
# More steps than this take longer than another launch.
_MOST_SUM_STEPS = 8


def _block(size: int, most: int) -> int:
    """A power of two that a matrix product takes and that covers `size`, if `most` allows it."""
    return min(max(triton.next_power_of_2(size), 16), most)


def _arithmetic(dtype: torch.dtype, is_tf32: bool | None = None) -> dict[str, Any]:
    """How a kernel of this dtype multiplies; `is_tf32` is PyTorch's setting unless given."""
    if dtype != torch.float32:
        return {"PRECISION": "tf32", **_WARPS}  # of 16-bit operands Triton ignores it
    if is_tf32 is None:  # not by cudnn.allow_tf32: reading it raises where conv and rnn differ
        is_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        is_tf32 = is_tf32 and not triton.knobs.runtime.interpret
    precision = "tf32" if is_tf32 else "ieee"
    return {"PRECISION": precision, **_WARPS, "maxnreg": _MOST_REGISTERS_FP32}


def _side(arithmetic: dict[str, Any]) -> int:
    """Most channels of a tile; without matrix instructions the operands stand in registers too."""
    return 32 if arithmetic["PRECISION"] == "ieee" else 64


def _programs(shape: Shape, size: int, block: int) -> int:
    return shape.groups * triton.cdiv(size, block)


def _forward_launch(shape: Shape, arithmetic: dict[str, Any]) -> dict[str, Any]:
    return {
        **shape.constants("C", "C_OUT", "GROUPS", "CP", "K", "RELU"),
        "BLOCK_M": _PIXELS,
        "BLOCK_N": _block(shape.width, _side(arithmetic)),
        "BLOCK_K": _block(shape.depth, _side(arithmetic) // 2),
        **_tap_blocks(shape, arithmetic),
        **arithmetic,
    }


def _tap_blocks(shape: Shape, arithmetic: dict[str, Any]) -> dict[str, int]:
    taps, most = shape.kernel**2 * shape.touched, _side(arithmetic) // 2
    return {"BLOCK_T": _block(taps, most), "BLOCK_P": _block(shape.touched, most)}


def _partial_launch(shape: Shape, arithmetic: dict[str, Any]) -> dict[str, Any]:
    return {
        **shape.constants("C", "CP", "K", "RELU"),
        "BLOCK_M": _PIXELS,
        **_tap_blocks(shape, arithmetic),
        **arithmetic,
    }


def _gradient_launch(shape: Shape, arithmetic: dict[str, Any]) -> dict[str, Any]:
    return {
        **shape.constants("C", "C_OUT", "GROUPS", "CP", "RELU"),
        "BLOCK_M": _PIXELS,
        "BLOCK_N": _block(shape.depth, _side(arithmetic)),
        "BLOCK_K": _block(shape.width, _side(arithmetic) // 2),
        **arithmetic,
    }


def _weight_launch(shape: Shape, arithmetic: dict[str, Any]) -> dict[str, Any]:
    launch = _gradient_launch(shape, arithmetic)
    return {**launch, "BLOCK_K": _block(shape.width, _side(arithmetic)), "BLOCK_M": _PIXELS // 2}


def _affine_launch(channels: int, relu: bool) -> dict[str, Any]:
    block = _block(channels, 64)
    return {"C": channels, "RELU": relu, "BLOCK_M": 4096 // block, "BLOCK_N": block, "num_warps": 4}


def _shape(
    x: Tensor, partial_weight: Tensor | None, point: Tensor, relu: bool, groups: int
) -> Shape:
    touched, kernel = (0, 1) if partial_weight is None else partial_weight.shape[1:3]
    return Shape(x.shape[1], point.shape[0], groups, touched, kernel, relu)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _taps_first(partial_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[k, k, c_p read, c_p written], as both directions take it; one copy at most, cast or not."""
    if partial_weight is None:
        return None
    taps = partial_weight.permute(2, 3, 1, 0)
    return taps.to(dtype, memory_format=torch.contiguous_format).contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _USUAL_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _pixel_splits(pixels: int, blocks: int, step: int, device: torch.device) -> tuple[int, int]:
    """Splits of the pixels for a sum that takes `blocks` programs a split, and pixels of a split.

    The latter is a multiple of `step`.
    """
    splits = triton.cdiv(_PROGRAMS_A_PROCESSOR * _processors(device), blocks)
    span = triton.cdiv(max(triton.cdiv(pixels, splits), _LEAST_SPAN), step) * step
    return triton.cdiv(pixels, span), span


def _sum_launch(rows: int, columns: int, first_columns: int) -> dict[str, int]:
    tile_rows, tile_columns = next(
        tile
        for most_rows, most_columns, tile in _SUM_TILES
        if rows <= (most_rows or rows) and columns <= (most_columns or columns)
    )
    align = min(shared_alignment(columns, first_columns), 4)
    launch = {"ALIGN": align, "ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": 8}
    return launch | {"maxnreg": 128}  # as with `_MOST_REGISTERS_FP32`


def _add_rows(rows: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Sums of the columns of rows [R, N] into `first` and, what is left, `second`.

    One launch, or for many rows two: the first has a program for each step that one would take.
    """
    count, columns = rows.shape
    launch = _sum_launch(count, columns, columns)
    splits = triton.cdiv(count, launch["ROWS"])
    if splits > _MOST_SUM_STEPS:
        sums = rows.new_empty(splits, columns)
        _launch_sum(rows, sums, None, splits, launch["ROWS"], columns, launch)
        _add_rows(sums, first, second)
        return
    launch = _sum_launch(count, columns, first.numel())
    _launch_sum(rows, first, second, 1, count, first.numel(), launch)


def _launch_sum(
    rows: Tensor,
    first: Tensor,
    second: Tensor | None,
    splits: int,
    span: int,
    first_columns: int,
    launch: dict[str, int],
) -> None:
    count, columns = rows.shape
    align = launch["ALIGN"]
    sum_rows_kernel[(triton.cdiv(columns, launch["COLUMNS"]), splits)](
        rows, first, second, count, span, columns // align, first_columns // align, **launch
    )


def launch_forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    residual: Tensor | None,
    relu: bool,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, sums and squared sums of `partial_pointwise_conv`; no checks, no host sync.

    Args and shapes are those of the operator; x and residual in bf16, fp16 or fp32, the weights in
    any floating dtype.
    """
    shape = _shape(x, partial_weight, point_weight, relu, groups)
    x, residual = _nhwc(x), None if residual is None else _nhwc(residual)
    pixels = x.numel() // shape.channels
    y = torch.empty(
        (x.shape[0], shape.out_channels, *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(pixels, _PIXELS)
    rows, sums, squared_sums = (
        new(tiles, 2 * shape.out_channels),
        new(shape.out_channels),
        new(shape.out_channels),
    )
    launch = _forward_launch(shape, _arithmetic(x.dtype))
    with torch.cuda.device_of(x):
        if pixels > 0:
            forward_kernel[(tiles * _programs(shape, shape.width, launch["BLOCK_N"]),)](
                x, residual, scale, shift,
                _taps_first(partial_weight, x.dtype), point_weight.to(x.dtype).contiguous(),
                y, rows, pixels, *x.shape[2:], **launch,
            )  # fmt: skip
        _add_rows(rows, sums, squared_sums)
    return y, sums, squared_sums


def launch_backward(
    grad_y: Tensor,
    grad_sums: Tensor | None,
    grad_squared_sums: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
    residual: Tensor | None,
    y: Tensor,
    relu: bool,
    groups: int,
    needs_x: bool,
    needs_weights: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale, shift, both weights and residual; None where not asked for.

    Those of x and residual are in their dtype, of a weight in its own, of scale and shift in fp32.
    """
    shape = _shape(x, partial_weight, point_weight, relu, groups)
    arithmetic = _arithmetic(x.dtype)
    x, grad_y, y = _nhwc(x), _nhwc(grad_y), _nhwc(y)
    residual = None if residual is None else _nhwc(residual)
    height, width = x.shape[2:]
    pixels = x.numel() // shape.channels
    tiles = triton.cdiv(pixels, _PIXELS)
    point = point_weight.to(x.dtype).contiguous()
    taps = _taps_first(partial_weight, x.dtype)
    upstream = (grad_y, grad_sums, grad_squared_sums, y)
    affine = (scale, shift)
    new = partial(torch.empty, dtype=torch.float32, device=x.device)

    grad_x = torch.empty_like(x) if needs_x else None
    grad_residual = torch.empty_like(x) if needs_residual else None
    grad_scale = new(shape.channels) if needs_x and scale is not None else None
    grad_shift = new(shape.channels) if needs_x and shift is not None else None
    rows = None
    if grad_scale is not None or grad_shift is not None:
        rows = new(tiles, 2 * shape.channels)
    dh2 = x.new_empty(pixels, shape.touched) if shape.touched else None
    towards_input = needs_x or needs_residual
    grad_partial = grad_point = None
    with torch.cuda.device_of(x):
        if pixels > 0 and (towards_input or (needs_weights and shape.touched)):
            launch = _gradient_launch(shape, arithmetic)
            point_gradient_kernel[(tiles * _programs(shape, shape.depth, launch["BLOCK_N"]),)](
                *upstream, x, *affine, point, grad_x, grad_residual, dh2, rows, pixels, **launch
            )
        if pixels > 0 and towards_input and shape.touched:
            launch = _partial_launch(shape, arithmetic)
            partial_gradient_kernel[(tiles * triton.cdiv(shape.touched, launch["BLOCK_P"]),)](
                dh2, taps,
                x, *affine, grad_x, grad_residual, rows, pixels, height, width, **launch,
            )  # fmt: skip
        if rows is not None:
            both = new(2, shape.channels)
            _add_rows(rows, both, None)
            grad_scale = None if grad_scale is None else both[0]
            grad_shift = None if grad_shift is None else both[1]
        if needs_weights:
            grad_point, grad_partial = _weight_gradients(
                shape, upstream, (x, residual, *affine), dh2, taps, partial_weight, point_weight
            )
    return grad_x, grad_scale, grad_shift, grad_partial, grad_point, grad_residual


def _weight_gradients(
    shape: Shape,
    upstream: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    dh2: Tensor | None,
    flat: Tensor | None,
    partial_weight: Tensor | None,
    point_weight: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the point weight and the partial weight; `flat` is the latter, taps first."""
    x, residual, scale, shift = inputs
    assert x is not None
    height, width = x.shape[2:]
    pixels, arithmetic = x.numel() // shape.channels, _arithmetic(x.dtype)
    launch = _weight_launch(shape, arithmetic)
    outputs = triton.cdiv(shape.width, launch["BLOCK_K"])
    programs = outputs * _programs(shape, shape.depth, launch["BLOCK_N"])
    splits, span = _pixel_splits(pixels, programs, launch["BLOCK_M"], x.device)
    taps = shape.kernel**2 * shape.touched
    columns = point_weight.numel() + taps * shape.touched
    rows = torch.empty(splits, columns, dtype=torch.float32, device=x.device)
    if pixels > 0:
        z = None
        if partial_weight is not None:
            z = x.new_empty(pixels, shape.touched)
            blocks = _partial_launch(shape, arithmetic)
            outputs = triton.cdiv(shape.touched, blocks["BLOCK_P"])
            partial_conv_kernel[(triton.cdiv(pixels, _PIXELS) * outputs,)](
                x, residual, scale, shift, flat, z,
                pixels, height, width, **blocks,
            )  # fmt: skip
            partial_weight_kernel[(splits * triton.cdiv(taps, blocks["BLOCK_T"]) * outputs,)](
                x, residual, scale, shift, dh2, rows, pixels, height, width, span, columns, **blocks
            )
        point_weight_kernel[(splits * programs,)](
            *upstream, x, residual, scale, shift, z, rows, pixels, span, columns, **launch
        )
    grad_point = torch.empty_like(point_weight, memory_format=torch.contiguous_format)
    grad_partial = None
    if partial_weight is not None:
        grad_partial = torch.empty_like(partial_weight, memory_format=torch.contiguous_format)
    _add_rows(rows, grad_point, grad_partial)
    return grad_point, grad_partial


def launch_affine_relu(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """act(x * scale + shift) in x's dtype, channels_last; x [N, C, H, W]."""
    x = _nhwc(x)
    y = torch.empty_like(x)
    channels = x.shape[1]
    pixels, launch = x.numel() // channels, _affine_launch(channels, relu)
    if pixels > 0:
        with torch.cuda.device_of(x):
            affine_relu_kernel[_affine_grid(pixels, launch)](x, scale, shift, y, pixels, **launch)
    return y


def launch_affine_relu_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, of scale and shift [C] in fp32."""
    x, grad_y = _nhwc(x), _nhwc(grad_y)
    grad_x = torch.empty_like(x)
    channels = x.shape[1]
    pixels, launch = x.numel() // channels, _affine_launch(channels, relu)
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    rows = new(triton.cdiv(pixels, launch["BLOCK_M"]), 2 * channels)
    grad_scale, grad_shift = new(channels), new(channels)
    with torch.cuda.device_of(x):
        if pixels > 0:
            affine_relu_backward_kernel[_affine_grid(pixels, launch)](
                grad_y, x, scale, shift, grad_x, rows, pixels, **launch
            )
        _add_rows(rows, grad_scale, grad_shift)
    return grad_x, grad_scale, grad_shift


def _affine_grid(pixels: int, launch: dict[str, Any]) -> tuple[int]:
    blocks = triton.cdiv(launch["C"], launch["BLOCK_N"])
    return (triton.cdiv(pixels, launch["BLOCK_M"]) * blocks,)


# Ahead-of-time compilation
# -----------------------------------------------------------------------

# Channels, middle channels, touched channels and fusion groups of stages: of WRN-40-2, resnet32x4
# (and ResNet-34), and of a wide teacher.
_AOT_STAGES = (
    (32, 8, 2, 1),
    (64, 16, 4, 1),
    (256, 64, 16, 1),
    (512, 128, 32, 1),
    (2048, 128, 32, 8),
)
_AOT_KERNELS = (3, 5, 7)


def aot_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    """Every kernel of this file, as the convolutions of `_AOT_STAGES` launch it.

    Args:
        dtype: bf16, fp16 or fp32.
    """
    for is_tf32 in (True, False) if dtype == torch.float32 else (None,):
        cases = partial(_conv_cases, dtype, _arithmetic(dtype, is_tf32))
        suffix = " ieee" if is_tf32 is False else ""
        for channels, middle, touched, groups in _AOT_STAGES:
            down = Shape(channels, middle, 1, 0, 1, False)
            up = Shape(middle, channels, 1, 0, 1, True)
            fusion = Shape(channels, channels, groups, 0, 1, False)
            name = f"C={channels}{suffix}"
            yield from cases(f"{name} down", down, ())
            for kernel in _AOT_KERNELS:
                scale = Shape(middle, middle, 1, touched, kernel, True)
                yield from cases(f"{name} k={kernel}", scale, ("affine",))
            yield from cases(f"{name} up", up, ("affine",))
            yield from cases(f"{name} fusion", fusion, ("affine", "residual"))
    yield from _affine_cases(dtype)


def _conv_cases(
    dtype: torch.dtype,
    arithmetic: dict[str, Any],
    name: str,
    shape: Shape,
    present: tuple[str, ...],
) -> Iterator[AotCase]:
    """The kernels of one convolution that has these of "affine" and "residual"."""
    absent: list[str] = []
    if "affine" not in present:
        absent += ["scale_ptr", "shift_ptr"]
    if "residual" not in present:
        absent += ["residual_ptr", "grad_residual_ptr"]
    if shape.touched == 0:
        absent += ["partial_ptr", "dh2_ptr", "z_ptr"]
    unsummed = [] if "affine" in present else ["sums_ptr"]
    launches = [
        (forward_kernel, _forward_launch(shape, arithmetic), absent),
        (point_gradient_kernel, _gradient_launch(shape, arithmetic), absent + unsummed),
        (point_weight_kernel, _weight_launch(shape, arithmetic), absent),
    ]
    if shape.touched:
        launch = _partial_launch(shape, arithmetic)
        kernels = (partial_conv_kernel, partial_gradient_kernel, partial_weight_kernel)
        launches += [(kernel, launch, absent) for kernel in kernels]
    for kernel, launch, missing in launches:
        none = {key: None for key in missing if key in kernel.arg_names}
        title = f"{kernel.__name__.removesuffix('_kernel')} {name}"
        is_mma = arithmetic["PRECISION"] == "tf32"
        yield aot_case(title, kernel, _types(dtype), launch | none, mma=is_mma)


def _affine_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    for channels in (32, 64):
        for relu in (False, True):
            launch = _affine_launch(channels, relu)
            for kernel in (affine_relu_kernel, affine_relu_backward_kernel):
                title = f"{kernel.__name__.removesuffix('_kernel')} C={channels}{' relu' * relu}"
                yield aot_case(title, kernel, _types(dtype), launch)
    yield from _sum_cases(dtype)


def _sum_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    """Every tile, for sums by channel (two of a kind, fp32) and for gradients of weights."""
    values = "*" + TRITON_NAME[dtype]
    for rows, columns in ((64, 128), (1024, 16), (1024, 128)):
        for align in (4, 1):
            launch = _sum_launch(rows, columns, columns + align) | {"ALIGN": align}
            tile = f"{launch['ROWS']}x{launch['COLUMNS']} ALIGN={align}"
            load = "v4.b32" if align == 4 else None
            weights = _types(dtype) | {"first_ptr": values, "second_ptr": values}
            alone = launch | {"second_ptr": None}
            for name, types, constants in (
                ("sums", _types(dtype), launch),
                ("alone", _types(dtype), alone),
                ("weights", weights, launch),
            ):
                yield aot_case(
                    f"sum_rows {name} {tile}",
                    sum_rows_kernel,
                    types,
                    constants,
                    max_registers=128,
                    load=load,
                )


def _types(dtype: torch.dtype) -> dict[str, str]:
    """Argument -> Triton type, for all kernels."""
    values = "*" + TRITON_NAME[dtype]
    single = ("scale", "shift", "sums", "grad_sums", "grad_squares", "rows")
    many = (
        "x", "residual", "partial", "point", "y", "grad_y", "z", "dh2", "grad_x", "grad_residual",
    )  # fmt: skip
    types = {f"{name}_ptr": values for name in many}
    types |= {f"{name}_ptr": "*fp32" for name in (*single, "first", "second")}
    return types
