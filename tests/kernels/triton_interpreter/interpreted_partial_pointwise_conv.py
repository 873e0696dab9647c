"""The Triton kernels of the prompt path against float64, within what rounding explains.

Run by ../test_triton_interpreter.py.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from error_bounds import RootMeanSquares, exact, excess
from prompt_conv_bounds import affine_relu_bounds, partial_pointwise_conv_bounds

from dfptkd.engine.models.prompt import PromptFusion
from dfptkd.kernels import use_backend
from dfptkd.kernels.batch_norm import affine_relu_reference
from dfptkd.kernels.partial_pointwise_conv import partial_pointwise_conv_reference
from dfptkd.kernels.partial_pointwise_conv_triton import (
    _add_rows,
    launch_affine_relu,
    launch_affine_relu_backward,
    launch_backward,
    launch_forward,
)

NAMES = ("x", "scale", "shift", "partial_weight", "point_weight", "residual")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    batch: int
    channels: int
    size: tuple[int, int]
    touched: int
    kernel: int
    out: int
    groups: int
    relu: bool
    parts: str
    """Of "scale", "shift" and "residual" those that are there, and "sums" for their gradients."""

    def __str__(self):
        return "-".join(str(v).removeprefix("torch.") for v in vars(self).values())


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    Case(FP32, 2, 8, (5, 7), 2, 3, 6, 1, True, "scale shift residual sums"),
    Case(FP32, 1, 1, (1, 1), 1, 3, 1, 1, False, "sums"),
    Case(FP32, 3, 20, (4, 3), 0, 1, 33, 1, True, "scale shift sums"),
    Case(FP32, 1, 20, (9, 2), 20, 5, 4, 2, False, "shift residual"),
    Case(FP32, 1, 64, (7, 6), 16, 7, 64, 1, True, "scale shift sums"),
    Case(FP32, 1, 3, (33, 5), 1, 7, 17, 1, True, "scale sums"),
    Case(FP32, 2, 16, (3, 5), 6, 3, 8, 4, True, "scale shift residual sums"),  # c_p in two groups
    Case(FP32, 1, 40, (6, 6), 40, 1, 12, 1, False, "residual sums"),
    Case(FP32, 2, 12, (1, 33), 3, 3, 12, 4, True, "scale shift residual"),
    Case(
        FP32, 2, 72, (4, 5), 36, 3, 70, 1, True, "scale shift sums"
    ),  # more than one block of each
    Case(FP16, 2, 16, (7, 6), 4, 5, 16, 1, True, "scale shift sums"),
    Case(FP16, 1, 64, (6, 5), 0, 1, 32, 8, False, "scale shift residual sums"),
    Case(FP16, 1, 8, (5, 5), 8, 3, 24, 2, True, ""),
    Case(BF16, 2, 16, (7, 6), 4, 7, 16, 1, True, "scale shift sums"),
    Case(BF16, 1, 32, (6, 6), 0, 1, 64, 1, False, "scale shift residual sums"),
    Case(BF16, 1, 20, (3, 4), 5, 3, 20, 4, True, "shift residual"),
]


def inputs_of(case):
    """fp64 tensors that the case's dtype holds, in the order of NAMES, and upstream gradients."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator).to(dtype).double()

    n, c, (h, w), k = case.batch, case.channels, case.size, case.kernel
    tensors = {
        "x": randn(n, c, h, w),
        "scale": 1 + 0.3 * randn(c, dtype=FP32),
        "shift": 0.3 * randn(c, dtype=FP32),
        "partial_weight": randn(case.touched, case.touched, k, k) / 4,
        "point_weight": randn(case.out, c // case.groups) / 4,
        "residual": randn(n, c, h, w),
    }
    absent = {"scale", "shift", "residual"} - set(case.parts.split())
    if case.touched == 0:
        absent.add("partial_weight")
    grads = [randn(n, case.out, h, w), None, None]
    if "sums" in case.parts:
        grads[1:] = [randn(case.out, dtype=FP32) / 4 for _ in range(2)]
    return [None if name in absent else tensors[name] for name in NAMES], grads


def cast(case, tensors, *, to=None):
    """scale, shift and the sums' gradients [C] stay fp32, all else takes the case's dtype."""
    return [
        None if t is None else t.to(to or (FP32 if t.dim() == 1 else case.dtype)) for t in tensors
    ]


def reference(case, dtype):
    """Outputs, then the gradients in the order of NAMES."""
    tensors, grads = inputs_of(case)
    tensors = [None if t is None else t.requires_grad_() for t in cast(case, tensors, to=dtype)]
    *first, residual = tensors
    outputs = partial_pointwise_conv_reference(*first, case.relu, residual, case.groups)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [*outputs, *(None if t is None else t.grad for t in tensors)]


def ours(case, needs=None):
    tensors, grads = inputs_of(case)
    needs = needs or (True, True, "residual" in case.parts)
    tensors, grads = cast(case, tensors), cast(case, grads)
    *first, residual = tensors
    y, sums, squares = launch_forward(*first, residual, case.relu, case.groups)
    options = (case.relu, case.groups, *needs)
    return [y, sums, squares, *launch_backward(*grads, *first, residual, y, *options)]


LABELS = ("y", "sums", "squared_sums", *NAMES)


def bounds(case, returned_y):
    tensors, grads = inputs_of(case)
    return partial_pointwise_conv_bounds(
        dict(zip(NAMES, tensors, strict=True)), grads, returned_y, relu=case.relu,
        groups=case.groups, dtype=case.dtype,
        is_truncated=case.dtype == BF16,  # the interpreter cuts a number off where a GPU rounds it
    )  # fmt: skip


@functools.cache
def results(case):
    """`ours`, once for two tests: the interpreter is slow."""
    return ours(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_within_those_of_rounding(case):
    found = results(case)
    expected = bounds(case, found[0])
    for name, value in zip(LABELS, found, strict=True):
        assert (value is not None) == (name in expected), name
        if value is not None:
            assert value.dtype == (FP32 if value.dim() == 1 else case.dtype), name
            assert excess(value, expected[name]) <= 1, name


def test_errors_are_at_most_twice_those_of_eager():
    """Their root mean square: either side is now and then exact by luck."""
    means, names = RootMeanSquares(), set()
    for case in (c for c in CASES if c.dtype == FP32):
        truth = reference(case, torch.float64)
        for side, values in (("ours", results(case)), ("eager", reference(case, FP32))):
            for name, value, true in zip(LABELS, values, truth, strict=True):
                if value is not None:
                    names.add(name)
                    means.add(f"{side} {name}", value, true)
    assert names == set(LABELS)
    for name in LABELS:
        print(f"{name}: {means[f'ours {name}']:.1e} {means[f'eager {name}']:.1e}")
        assert means[f"ours {name}"] <= 2 * means[f"eager {name}"], name


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_the_bounds_tell_a_wrong_kernel_apart(dtype, monkeypatch):
    """Negative controls: a tap, a channel or a line of pixels left out."""
    case = replace(CASES[0], dtype=dtype)
    expected = bounds(case, ours(case)[0])
    right = inputs_of(case)

    def change(name, index):
        tensors = [None if t is None else t.clone() for t in right[0]]
        tensors[NAMES.index(name)][index] = 0
        monkeypatch.setitem(globals(), "inputs_of", lambda _: (tensors, right[1]))
        found = ours(case)
        return {
            name: excess(value, expected[name]) for name, value in zip(LABELS, found, strict=True)
        }

    for name, index in (
        ("partial_weight", (1, 0, 0, 2)),
        ("point_weight", (slice(None), 5)),
        ("residual", (slice(None), slice(None), 4)),
    ):
        found = change(name, index)
        print(name, {key: f"{value:.0f}" for key, value in found.items()})
        if dtype == FP32:
            assert min(found.values()) >= 100, found
        else:  # one tap is little beside eight or eleven bits
            least = 1 if name == "partial_weight" else 10
            assert min(found[key] for key in ("y", "x", "residual")) > least, found


def test_two_launches_have_the_same_bits():
    first, second = ours(CASES[0]), ours(CASES[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("needs", "absent"),
    [
        ((False, True, True), {"x", "scale", "shift"}),
        ((True, False, True), {"partial_weight", "point_weight"}),
        ((True, True, False), {"residual"}),
        ((False, True, False), {"x", "scale", "shift", "residual"}),
    ],
    ids=str,
)
def test_what_is_not_asked_for_is_left_out_and_changes_nothing_else(needs, absent):
    every, some = ours(CASES[0])[3:], ours(CASES[0], needs)[3:]
    for name, a, b in zip(NAMES, every, some, strict=True):
        assert b is None if name in absent else torch.equal(a, b), name


@pytest.mark.parametrize(
    ("rows", "columns", "first_columns"),
    [
        (1, 3, 2),
        (64, 128, 64),
        (65, 130, 66),
        (700, 16, 8),
        (2048, 40, 20),  # the most of one launch
        (2049, 40, 20),  # two launches
        (5000, 33, 33),
        (4097, 12, 5),
        (0, 8, 4),
    ],
)
def test_rows_are_added_up_in_every_tile_and_number_of_launches(rows, columns, first_columns):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    found = torch.full((2, columns), torch.nan)
    for line in found:
        second = line[first_columns:] if first_columns < columns else None
        _add_rows(values, line[:first_columns], second)
    assert torch.equal(*found)
    # The sum of n terms errs by less than n eps / 2 times their magnitudes, whatever its order.
    bound = rows * torch.finfo(FP32).eps / 2 * values.double().abs().sum(0)
    assert ((found[0].double() - values.double().sum(0)).abs() <= bound).all()


def test_no_image_at_all():
    y, sums, squares = launch_forward(
        torch.empty(0, 8, 3, 3), None, None, None, torch.ones(4, 8), None, True, 1
    )
    assert y.shape == (0, 4, 3, 3)
    assert torch.equal(sums, torch.zeros(4))
    assert torch.equal(squares, torch.zeros(4))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_affine_relu(dtype, relu):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 70, 5, 7, generator=generator).to(dtype)
    scale, shift = torch.randn(2, 70, generator=generator)
    y = launch_affine_relu(x, scale, shift, relu)
    found = launch_affine_relu_backward(grad, x, scale, shift, relu)
    leaves = [t.double().requires_grad_() for t in (x, scale, shift)]
    want = affine_relu_reference(*leaves, relu)
    gradients = torch.autograd.grad(want, leaves, grad.double())
    assert y.dtype == found[0].dtype == dtype
    is_truncated = dtype == BF16
    expected = affine_relu_bounds(
        *map(exact, (x, scale, shift, grad)), relu=relu, dtype=dtype, is_truncated=is_truncated
    )
    for value, true, bound in zip((y, *found), (want, *gradients), expected, strict=True):
        assert excess(true, bound) <= 1e-6  # the same function, by autograd
        assert excess(value, bound) <= 1
        assert excess(value.roll(1, -1), bound) >= 10


def test_a_prompt_and_fusion_pair_takes_them():
    torch.manual_seed(0)
    pair = PromptFusion(16)
    x, grad = torch.randn(2, 2, 16, 5, 6)

    def gradients(name):
        pair.zero_grad()
        with use_backend(name):
            y = pair(x)
            y.backward(grad)
        return [y.detach(), *(p.grad.clone() for p in pair.parameters())]

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
