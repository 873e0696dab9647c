"""Triton backend of the loss family: `dual_path_loss`, and `distillation_loss` without a prompt.

One program a row makes the row's loss terms, hits and gradients; one more program then sums the
rows in a fixed order. The equations stand in dual_path_loss.py and distillation_loss.py. Padding
beyond the last class is a class of probability 0, a logit of -inf.

A program walks over its row in blocks: once for the maxima and sums of the softmaxes, once for
terms and gradients (`reverse_kl`: gradients in a third walk, since they need the whole row's KL).
Up to 4096 classes the row is one block; the compiler then merges the walks, and every logit is
loaded once and stays in a register.

The mean divides by the counted rows, which every gradient needs before it is written. A batch up
to `SMALL_BATCH` has so few labels that each program counts them itself while its logits are on the
way; above, that would outweigh the logits, and one program launched before counts them.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import TRITON_NAME, AotCase, aot_case, row_launch, shared_alignment, widest_load

SMALL_BATCH = 1024  # up to here two launches do it all: 8 KB of labels, 32 KB of row results
# A row's results: its six terms (distillation: two), hit of student, hit of prompt.
COLUMNS = tl.constexpr(8)
STUDENT_HIT = tl.constexpr(6)
PROMPT_HIT = tl.constexpr(7)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A new batch size or stride is no reason to compile again.
_INTEGERS = (
    "student_stride", "prompt_stride", "teacher_stride", "target_stride", "rows", "results",
    "ignore_index",
)  # fmt: skip


# One row
# -----------------------------------------------------------------------


@triton.jit
def _load_logits(row_ptr, columns, valid, keep):
    """[BLOCK] in fp32. An ignored row is not read at all: it may hold NaN."""
    z = tl.load(row_ptr + columns, mask=valid & keep, other=0.0).to(tl.float32)
    return tl.where(valid, z, float("-inf"))


@triton.jit
def _load_target(row_ptr, columns, valid, label, smoothing, C: tl.constexpr, SOFT: tl.constexpr):
    """Smoothed target probabilities [BLOCK], 0 in the padding."""
    if SOFT:
        y = tl.load(row_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    else:
        y = tl.where(columns == label, 1.0, 0.0)
    return tl.where(valid, tl.fma(y, 1.0 - smoothing, smoothing / C), 0.0)


@triton.jit
def _soft_label(row_ptr, smoothing, C: tl.constexpr, BLOCK: tl.constexpr):
    """(argmax, sum after smoothing) of a row of target probabilities."""
    label, best, mass = tl.zeros((), tl.int64), float("-inf"), 0.0
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        valid = columns < C
        y = tl.load(row_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        block_best, position = tl.max(tl.where(valid, y, float("-inf")), 0, return_indices=True)
        label = tl.where(block_best > best, start + position, label)
        best = tl.maximum(best, block_best)
        mass += tl.sum(_load_target(row_ptr, columns, valid, label, smoothing, C, True), 0)
    return label, mass


@triton.jit
def _split_four(x):
    """[2, 2] -> four scalars, in the order in which they were joined."""
    ab, cd = tl.split(x)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def _sum_four(a, b, c, d):
    """Four sums for the barriers of one, all in the same order. Some may be the same."""
    return _split_four(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))


@triton.jit
def _max_four(a, b, c, d):
    return _split_four(tl.max(tl.join(tl.join(a, b), tl.join(c, d)), 0))


# `sums` of a row: its largest logit, sum of exp(z / tau), sum of exp(z), both relative to that.


@triton.jit
def _raised(sums, peak, rate):
    """The same sums, relative to a new maximum."""
    peak = tl.maximum(sums[0], peak)
    shrink = sums[0] - _shift(peak)
    return peak, sums[1] * tl.exp2(shrink * rate), sums[2] * tl.exp2(shrink * LOG2_E)


@triton.jit
def _shift(peak):
    """What is taken off the logits: their maximum, unless all are -inf so far."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _finished(sums):
    """A row of nothing but -inf has no softmax: NaN, as everywhere else."""
    none = sums[0] == float("-inf")
    nan = float("nan")
    return _shift(sums[0]), tl.where(none, nan, sums[1]), tl.where(none, nan, sums[2])


@triton.jit
def _softmax(d, sums, rate):
    """(x, exp2(x) / sum, sum): d / tau in bits and probabilities [BLOCK], what was divided by."""
    x = d * rate
    return x, tl.exp2(x) * (1.0 / sums[1]), sums[1]


@triton.jit
def _log_ratio(q, p):
    """log2(q / p) [BLOCK], 0 where q is: such a class adds nothing, and -inf + inf would.

    0 for equal logits, and for similar ones closer than a difference of log-probabilities comes.
    """
    ratio = q[0] - p[0] + tl.log2(p[2] / q[2])
    nothing = q[2] * 0.0  # NaN in a row that is NaN
    return tl.where(q[0] == float("-inf"), nothing, ratio)


@triton.jit
def _kl(supervisor, learner, REVERSE: tl.constexpr):
    """Share of each class [BLOCK] in the KL, in bits."""
    if REVERSE:
        share = learner[1] * _log_ratio(learner, supervisor)
    else:
        share = supervisor[1] * _log_ratio(supervisor, learner)
    return share


@triton.jit
def _kl_gradient(supervisor, learner, kl, REVERSE: tl.constexpr):
    """Gradient of KL towards the learner's z / tau; `kl` is the whole row's, in bits."""
    if REVERSE:
        gradient = learner[1] * (_log_ratio(learner, supervisor) - kl) * LN_2
    else:
        gradient = learner[1] - supervisor[1]
    return gradient


@triton.jit
def _cross_entropy(d, sums, y, valid, SOFT: tl.constexpr):
    """Share of each class [BLOCK]; of labels only what smoothing needs: `_cross_entropy_row`."""
    soft = tl.where(y == 0.0, 0.0, y * (tl.log(sums[2]) - d))
    return soft if SOFT else tl.where(valid, d, 0.0)


@triton.jit
def _cross_entropy_row(share, sums, z_label, smoothing, C: tl.constexpr, SOFT: tl.constexpr):
    if SOFT:
        loss = share
    else:
        log_sum = tl.log(sums[2])
        smooth = tl.where(smoothing == 0.0, 0.0, smoothing * (log_sum - share / C))
        loss = (1.0 - smoothing) * (log_sum - (z_label - sums[0])) + smooth
    return loss


@triton.jit
def _unbeaten(z, columns, z_label, label):
    """1 for each class [BLOCK] that keeps the label from being the argmax, NaN among them."""
    beaten = (z < z_label) | ((z == z_label) & (columns >= label))
    return tl.where(beaten, 0.0, 1.0)


@triton.jit
def _weighted(weight, x):
    """A zero weight drops even a NaN."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _store_gradient(
    row_ptr, columns, valid, scale, tau, d, sums, y, mass, own, w_ce,
    supervisor, kl, w_kl, other, other_kl, w_other, DUAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradient of the weighted terms of one learner, rounded once. tau^2 KL brings one tau."""
    p = tl.exp2(d * LOG2_E) * (1.0 / sums[2])
    gradient = _weighted(w_ce, tl.fma(p, mass, -y))
    gradient += _weighted(w_kl * tau, _kl_gradient(supervisor, own, kl, REVERSE))
    if DUAL:
        gradient += _weighted(w_other * tau, _kl_gradient(other, own, other_kl, REVERSE))
    tl.store(row_ptr + columns, (gradient * scale).to(row_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _counted_labels(target_ptr, target_stride, rows, ignore_index, BLOCK: tl.constexpr):
    count = tl.zeros((), tl.int64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        label = tl.load(target_ptr + row * target_stride, mask=row < rows, other=ignore_index)
        count += tl.sum((label != ignore_index).to(tl.int64), 0)
    return count


@triton.jit
def _counted_rows(
    count_ptr,
    target_ptr,
    target_stride,
    rows,
    ignore_index,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the mean divides by: all rows, or those counted before, or counted here; at least 1."""
    if SOFT:
        count = rows
    elif count_ptr is not None:
        count = tl.load(count_ptr)
    else:
        count = _counted_labels(target_ptr, target_stride, rows, ignore_index, BLOCK)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _store_result(result_ptr, keep, value):
    tl.store(result_ptr, tl.where(keep, value, 0.0))


@triton.jit(do_not_specialize=_INTEGERS)
def loss_rows_kernel(
    student_ptr,  # [B, C], like prompt and teacher
    prompt_ptr,  # None: distillation_loss
    teacher_ptr,
    target_ptr,  # int64 [B]; SOFT: [B, C]
    weights_ptr,  # fp32 [6]; distillation: [2]
    count_ptr,  # int64 [], or None
    grad_student_ptr,  # [B, C] contiguous
    grad_prompt_ptr,
    results_ptr,  # fp32 [B, COLUMNS]
    student_stride: tl.int64,  # strides in units of ALIGN elements, that of labels in elements
    prompt_stride: tl.int64,
    teacher_stride: tl.int64,
    target_stride: tl.int64,
    rows: tl.int64,
    tau,
    smoothing,
    ignore_index: tl.int64,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SOFT: tl.constexpr,
    REVERSE: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    DUAL: tl.constexpr = prompt_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    rate = LOG2_E / tau  # exp(d / tau) = 2 ** (d rate)
    student_row = student_ptr + row * (student_stride * ALIGN)
    teacher_row = teacher_ptr + row * (teacher_stride * ALIGN)
    prompt_row = prompt_ptr + row * (prompt_stride * ALIGN) if DUAL else student_row
    target_row = target_ptr + row * (target_stride * ALIGN) if SOFT else target_ptr

    if SOFT:
        label, mass = _soft_label(target_row, smoothing, C, BLOCK)
        keep = row < rows
    else:
        label, mass = tl.load(target_ptr + row * target_stride), 1.0
        in_range = (label >= 0) & (label < C)
        tl.device_assert(in_range | (label == ignore_index), "dfptkd: label out of range")
        keep = in_range & (label != ignore_index)
    s_label = tl.load(student_row + label, mask=keep, other=0.0).to(tl.float32)
    p_label = tl.load(prompt_row + label, mask=keep, other=0.0).to(tl.float32)
    count = _counted_rows(
        count_ptr, target_ptr, target_stride, rows, ignore_index, SOFT, COUNT_BLOCK
    )
    scale = tl.where(keep, 1.0 / count, 0.0)

    # First walk: maxima, sums and hits. Without a prompt path, the student stands in for it.
    nothing = (float("-inf"), 0.0, 0.0)
    s_sums, p_sums, t_sums = nothing, nothing, nothing
    s_unbeaten, p_unbeaten = 0.0, 0.0
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        valid = columns < C
        s_z = _load_logits(student_row, columns, valid, keep)
        p_z = _load_logits(prompt_row, columns, valid, keep)
        t_z = _load_logits(teacher_row, columns, valid, keep)
        s_peak, p_peak, t_peak, _ = _max_four(s_z, p_z, t_z, t_z)
        s_sums = _raised(s_sums, s_peak, rate)
        p_sums = _raised(p_sums, p_peak, rate)
        t_sums = _raised(t_sums, t_peak, rate)
        s_d, p_d, t_d = s_z - _shift(s_sums[0]), p_z - _shift(p_sums[0]), t_z - _shift(t_sums[0])
        # The sums at tau are made together, so that equal logits have equal ones.
        s_tau, p_tau, t_tau, s_one = _sum_four(
            tl.exp2(s_d * rate), tl.exp2(p_d * rate), tl.exp2(t_d * rate), tl.exp2(s_d * LOG2_E)
        )
        s_unbeaten_ = _unbeaten(s_z, columns, s_label, label)
        p_unbeaten_ = _unbeaten(p_z, columns, p_label, label)
        s_unbeaten_, p_unbeaten_, p_one, _ = _sum_four(
            s_unbeaten_, p_unbeaten_, tl.exp2(p_d * LOG2_E), p_unbeaten_
        )
        s_sums = (s_sums[0], s_sums[1] + s_tau, s_sums[2] + s_one)
        p_sums = (p_sums[0], p_sums[1] + p_tau, p_sums[2] + p_one)
        t_sums = (t_sums[0], t_sums[1] + t_tau, t_sums[2])
        s_unbeaten, p_unbeaten = s_unbeaten + s_unbeaten_, p_unbeaten + p_unbeaten_

    s_sums, p_sums, t_sums = _finished(s_sums), _finished(p_sums), _finished(t_sums)

    w_s_ce, w_st, w_sp = tl.load(weights_ptr), tl.load(weights_ptr + 1), 0.0
    if DUAL:
        w_sp, w_p_ce = tl.load(weights_ptr + 2), tl.load(weights_ptr + 3)
        w_pt, w_ps = tl.load(weights_ptr + 4), tl.load(weights_ptr + 5)

    # Second walk: terms, and gradients where they do not need the whole row's KL.
    s_ce, kl_st, kl_sp, p_ce, kl_pt, kl_ps = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for walk in tl.static_range(1 + REVERSE):
        for start in range(0, C, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            valid = columns < C
            y = _load_target(target_row, columns, valid, label, smoothing, C, SOFT)
            s_d = _load_logits(student_row, columns, valid, keep) - s_sums[0]
            p_d = _load_logits(prompt_row, columns, valid, keep) - p_sums[0]
            t_d = _load_logits(teacher_row, columns, valid, keep) - t_sums[0]
            s, p = _softmax(s_d, s_sums, rate), _softmax(p_d, p_sums, rate)
            t = _softmax(t_d, t_sums, rate)
            if walk == 0:
                s_ce_, kl_st_, kl_sp_, p_ce_ = _sum_four(
                    _cross_entropy(s_d, s_sums, y, valid, SOFT),
                    _kl(t, s, REVERSE),
                    _kl(p, s, REVERSE),
                    _cross_entropy(p_d, p_sums, y, valid, SOFT),
                )
                s_ce, kl_st, kl_sp, p_ce = (
                    s_ce + s_ce_,
                    kl_st + kl_st_,
                    kl_sp + kl_sp_,
                    p_ce + p_ce_,
                )
            if walk == 0 and DUAL:
                kl_pt_, kl_ps_ = _kl(t, p, REVERSE), _kl(s, p, REVERSE)
                kl_pt_, kl_ps_, _, _ = _sum_four(kl_pt_, kl_ps_, kl_pt_, kl_ps_)
                kl_pt, kl_ps = kl_pt + kl_pt_, kl_ps + kl_ps_
            if walk == REVERSE:
                _store_gradient(
                    grad_student_ptr + row * C, columns, valid, scale, tau, s_d, s_sums, y, mass, s,
                    w_s_ce, t, kl_st, w_st, p, kl_sp, w_sp, DUAL, REVERSE,
                )  # fmt: skip
            if walk == REVERSE and DUAL:
                _store_gradient(
                    grad_prompt_ptr + row * C, columns, valid, scale, tau, p_d, p_sums, y, mass, p,
                    w_p_ce, t, kl_pt, w_pt, s, kl_ps, w_ps, DUAL, REVERSE,
                )  # fmt: skip

    results = results_ptr + row * COLUMNS
    bits_to_loss = LN_2 * tau * tau
    s_ce = _cross_entropy_row(s_ce, s_sums, s_label, smoothing, C, SOFT)
    _store_result(results, keep, s_ce)
    _store_result(results + 1, keep, kl_st * bits_to_loss)
    _store_result(results + STUDENT_HIT, keep, tl.where(s_unbeaten == 0.0, 1.0, 0.0))
    if DUAL:
        p_ce = _cross_entropy_row(p_ce, p_sums, p_label, smoothing, C, SOFT)
        _store_result(results + 2, keep, kl_sp * bits_to_loss)
        _store_result(results + 3, keep, p_ce)
        _store_result(results + 4, keep, kl_pt * bits_to_loss)
        _store_result(results + 5, keep, kl_ps * bits_to_loss)
        _store_result(results + PROMPT_HIT, keep, tl.where(p_unbeaten == 0.0, 1.0, 0.0))


# All rows
# -----------------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def count_rows_kernel(
    target_ptr, count_ptr, target_stride: tl.int64, rows: tl.int64, ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """count [] int64 = number of labels that are not ignore_index. One program."""
    count = _counted_labels(target_ptr, target_stride, rows, ignore_index, BLOCK)
    tl.store(count_ptr, count)


@triton.jit
def _sum_rows(results_ptr, first, rows, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """[COLUMNS]: sum of `BLOCK` rows of results from `first` on."""
    row = first + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & _is_result(column, TERMS)
    return tl.sum(tl.load(results_ptr + row * COLUMNS + column, mask=mask, other=0.0), 0)


@triton.jit
def _is_result(column, TERMS: tl.constexpr):
    """Columns that the loss has at all: the others are never written."""
    return (column < TERMS) | (column == STUDENT_HIT) | ((column == PROMPT_HIT) & (TERMS == 6))


@triton.jit(do_not_specialize=_INTEGERS)
def sum_rows_kernel(
    results_ptr, sums_ptr, rows: tl.int64, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    """results [B, COLUMNS] -> sums [ceil(B / BLOCK), COLUMNS], for a large batch."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    sums = _sum_rows(results_ptr, block * BLOCK, rows, TERMS, BLOCK)
    tl.store(sums_ptr + block * COLUMNS + column, sums, mask=_is_result(column, TERMS))


@triton.jit(do_not_specialize=_INTEGERS)
def finish_kernel(
    results_ptr,  # fp32 [results, COLUMNS]
    weights_ptr,  # fp32 [TERMS]
    target_ptr,
    count_ptr,
    total_ptr,  # fp32 []
    terms_ptr,  # fp32 [TERMS]
    student_correct_ptr,  # int64 [], like prompt_correct
    prompt_correct_ptr,  # None: distillation_loss
    target_stride: tl.int64,
    results: tl.int64,  # rows, or sums of rows where there are many
    rows: tl.int64,
    ignore_index: tl.int64,
    SOFT: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means, weighted total and hits. One program, so that the order of the sum is fixed."""
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, results, BLOCK):
        sums += _sum_rows(results_ptr, first, results, TERMS, BLOCK)
    count = _counted_rows(count_ptr, target_ptr, target_stride, rows, ignore_index, SOFT, BLOCK)
    means = sums / count
    is_term = column < TERMS
    weights = tl.load(weights_ptr + column, mask=is_term, other=0.0)
    tl.store(total_ptr, tl.sum(_weighted(weights, means), 0))
    tl.store(terms_ptr + column, means, mask=is_term)
    tl.store(student_correct_ptr, _column(sums, STUDENT_HIT))
    if prompt_correct_ptr is not None:
        tl.store(prompt_correct_ptr, _column(sums, PROMPT_HIT))


@triton.jit
def _column(sums, which: tl.constexpr):
    """One of the sums, as int64."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS) == which, sums, 0.0), 0).to(tl.int64)


# Launch
# -----------------------------------------------------------------------


_COUNT_LAUNCH = {"BLOCK": 8192, "num_warps": 32}
_SUM_LAUNCH = {"BLOCK": 256, "num_warps": 8, "enable_fp_fusion": False}


def _rows_launch(classes: int, align: int, soft: bool, reverse_kl: bool) -> dict[str, int | bool]:
    """Constants and options of `loss_rows_kernel`."""
    launch = row_launch(classes, is_heavy=reverse_kl)
    return {
        "C": classes,  # a constant: masks of whole 16-byte groups for rows of 1000
        "BLOCK": launch.block,
        "ALIGN": align,
        "SOFT": soft,
        "REVERSE": reverse_kl,
        "COUNT_BLOCK": 256,
        "num_warps": launch.num_warps,
        # KL of identical logits is exactly 0 only where both sides round alike; the default differs
        # between versions of Triton.
        "enable_fp_fusion": False,
        # Keeps the assertion on labels, and would bring overflow checks with it.
        "debug": True,
        "sanitize_overflow": False,
    }


def launch_dual_path_loss(
    student: Tensor,
    prompt: Tensor,
    teacher: Tensor,
    target: Tensor,
    weights: Tensor,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both gradients and all values of `dual_path_loss`; no checks, no host sync.

    Args:
        student: Student logits [B, C], bf16, fp16 or fp32; any stride over B. Copied first if the
            stride over C is not 1.
        prompt: Prompt-path logits, the same.
        teacher: Original-path logits, the same.
        target: Labels, int64 [B], or class probabilities [B, C].
        weights: fp32 [6] on the device of the logits.
        tau: Temperature, above 0.
        label_smoothing: In [0, 1).
        ignore_index: Label of the rows that do not count.
        reverse_kl: KL(learner || supervisor).

    Returns:
        total fp32 [], terms fp32 [6], student_correct and prompt_correct int64 [], grad_student and
        grad_prompt [B, C] in the dtype of the logits: gradients of total.
    """
    total, terms, hits, gradients = _launch(
        (student, prompt), teacher, target, weights, tau, label_smoothing, ignore_index, reverse_kl
    )
    return total, terms, hits[0], hits[1], gradients[0], gradients[1]


def launch_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weights: Tensor,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for `distillation_loss`: total, terms [2], correct, grad_student."""
    total, terms, hits, gradients = _launch(
        (student,), teacher, target, weights, tau, label_smoothing, ignore_index, reverse_kl
    )
    return total, terms, hits[0], gradients[0]


def _launch(
    learners: tuple[Tensor, ...],
    teacher: Tensor,
    target: Tensor,
    weights: Tensor,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    reverse_kl: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """total, terms, hits, gradients; one or two learners."""
    student, *prompts = (_unit_stride(z) for z in learners)
    prompt = prompts[0] if prompts else None
    teacher, target, weights = _unit_stride(teacher), _unit_stride(target), weights.contiguous()
    rows, classes = student.shape
    soft = target.is_floating_point()
    strides = [z.stride(0) if z is not None else 0 for z in (student, prompt, teacher)]
    align = shared_alignment(*strides, target.stride(0) if soft else 0)
    target_stride = target.stride(0) // align if soft else target.stride(0)

    new = partial(torch.empty, dtype=torch.float32, device=student.device)
    total, terms, results = new(()), new(len(weights)), new(rows, COLUMNS.value)
    hits = [new((), dtype=torch.int64) for _ in learners]
    gradients = [new(rows, classes, dtype=student.dtype) for _ in learners]
    count = None
    with torch.cuda.device_of(student):
        if rows > SMALL_BATCH and not soft:
            count = new((), dtype=torch.int64)
            count_rows_kernel[(1,)](
                target, count, target_stride, rows, ignore_index, **_COUNT_LAUNCH
            )
        if rows > 0:
            loss_rows_kernel[(rows,)](
                student, prompt, teacher, target, weights, count,
                gradients[0], gradients[1] if prompt is not None else None, results,
                *(stride // align for stride in strides), target_stride,
                rows, tau, label_smoothing, ignore_index,
                **_rows_launch(classes, align, soft, reverse_kl),
            )  # fmt: skip
        if rows > SMALL_BATCH:
            results = _partial_sums(results, len(weights))
        finish_kernel[(1,)](
            results, weights, target, count, total, terms,
            hits[0], hits[1] if prompt is not None else None,
            target_stride, len(results), rows, ignore_index,
            SOFT=soft, TERMS=len(weights), **_SUM_LAUNCH,
        )  # fmt: skip
    return total, terms, hits, gradients


def _unit_stride(z: Tensor) -> Tensor:
    """Rows [B, C] as the kernel reads them; labels [B] may have any stride."""
    return z if z.dim() == 1 or z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous()


def _partial_sums(results: Tensor, terms: int) -> Tensor:
    """A large batch's results [B, COLUMNS] by many programs: one alone reads too slowly."""
    programs = triton.cdiv(len(results), _SUM_LAUNCH["BLOCK"])
    sums = results.new_empty(programs, COLUMNS.value)
    sum_rows_kernel[(programs,)](results, sums, len(results), TERMS=terms, **_SUM_LAUNCH)
    return sums


# Ahead-of-time compilation
# -----------------------------------------------------------------------

# Each entry of the launch table, the row lengths with 16-, 8- and 2-byte loads, and the loop.
_AOT_CLASSES = (10, 20, 50, 100, 256, 512, 1000, 1001, 2048, 4096, 21841)


def aot_cases(dtype: torch.dtype) -> Iterator[AotCase]:
    """Every kernel of this file for logits of one dtype, in all variants that a launch can choose.

    Args:
        dtype: bf16, fp16 or fp32.
    """
    off_on = (False, True)
    for classes in _AOT_CLASSES:
        for single, soft, reverse in product(off_on, off_on, off_on):
            yield _rows_case(dtype, classes, not single, soft, reverse)
    yield _rows_case(dtype, 1000, dual=True, soft=False, reverse=False, counted=True)
    if dtype == torch.bfloat16:  # the others never see the logits
        yield from _summing_cases()


def _rows_case(
    dtype: torch.dtype, classes: int, dual: bool, soft: bool, reverse: bool, counted: bool = False
) -> AotCase:
    constants = _rows_launch(classes, shared_alignment(classes), soft, reverse)
    logits, launch = "*" + TRITON_NAME[dtype], row_launch(classes, is_heavy=reverse)
    absent = {} if dual else {"prompt_ptr": None, "grad_prompt_ptr": None}
    return aot_case(
        "{} C={}{}{}{}".format(
            "dual" if dual else "kd",
            classes,
            " soft" * soft,
            " reverse" * reverse,
            " counted" * counted,
        ),
        loss_rows_kernel,
        {
            "student_ptr": logits,
            "prompt_ptr": logits,
            "teacher_ptr": logits,
            "target_ptr": "*fp32" if soft else "*i64",
            "weights_ptr": "*fp32",
            "count_ptr": "*i64",
            "grad_student_ptr": logits,
            "grad_prompt_ptr": logits,
            "results_ptr": "*fp32",
            "tau": "fp32",
            "smoothing": "fp32",
        },
        constants | absent | ({} if counted else {"count_ptr": None}),
        max_registers=launch.max_registers,
        load=widest_load(classes, launch, dtype),
    )


def _summing_cases() -> Iterator[AotCase]:
    types = {
        "target_ptr": "*i64",
        "count_ptr": "*i64",
        "results_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "weights_ptr": "*fp32",
        "total_ptr": "*fp32",
        "terms_ptr": "*fp32",
        "student_correct_ptr": "*i64",
        "prompt_correct_ptr": "*i64",
    }
    yield aot_case("count", count_rows_kernel, types, _COUNT_LAUNCH, max_registers=64)
    for terms, absent in ((6, {}), (2, {"prompt_correct_ptr": None})):
        launch = {"TERMS": terms, **_SUM_LAUNCH}
        yield aot_case(f"sum {terms}", sum_rows_kernel, types, launch)
        for soft, counted in ((False, False), (False, True), (True, False)):
            variant = absent | {"SOFT": soft} | ({} if counted else {"count_ptr": None})
            name = f"finish {terms}{' soft' * soft}{' counted' * counted}"
            yield aot_case(name, finish_kernel, types, launch | variant)
