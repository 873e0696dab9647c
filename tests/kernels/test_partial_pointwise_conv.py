"""partial_pointwise_conv against its definition in fp64; FasterNet's partial conv (M10)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.kernels import partial_pointwise_conv
from dfptkd.kernels.partial_pointwise_conv import partial_conv


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_case(n=2, c=8, h=5, w=7, touched=2, k=3, out=6, groups=1, affine=True, residual=True):
    return {
        "x": randn(n, c, h, w),
        "scale": 1 + 0.5 * randn(c, seed=1) if affine else None,
        "shift": randn(c, seed=2) if affine else None,
        "partial_weight": randn(touched, touched, k, k, seed=3) if touched else None,
        "point_weight": randn(out, c // groups, seed=4),
        "residual": randn(n, c, h, w, seed=5) if residual else None,
        "groups": groups,
    }


def literal_conv(h, weight):
    """Stride 1, zero padding, tap by tap. h [N, c, H, W], weight [o, c, k, k], both numpy."""
    k, (height, width) = weight.shape[-1], h.shape[2:]
    padded = np.pad(h, ((0, 0), (0, 0), (k // 2,) * 2, (k // 2,) * 2))
    out = np.zeros((h.shape[0], weight.shape[0], height, width))
    for i in range(k):
        for j in range(k):
            window = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("oc,nchw->nohw", weight[:, :, i, j], window)
    return out


def definition(x, scale, shift, partial_weight, point_weight, *, relu, residual, groups):
    x, scale, shift, partial_weight, point_weight, residual = (
        None if t is None else t.detach().double().numpy()
        for t in (x, scale, shift, partial_weight, point_weight, residual)
    )
    h = x.copy()
    for c in range(h.shape[1]):
        h[:, c] = h[:, c] * (1 if scale is None else scale[c]) + (0 if shift is None else shift[c])
    if relu:
        h = np.where(h > 0, h, 0)
    if residual is not None:
        h = h + residual
    if partial_weight is not None:
        touched = partial_weight.shape[0]
        h = np.concatenate([literal_conv(h[:, :touched], partial_weight), h[:, touched:]], axis=1)
    wide_in, wide_out = h.shape[1] // groups, point_weight.shape[0] // groups
    y = np.concatenate(
        [
            np.einsum(
                "oc,nchw->nohw",
                point_weight[g * wide_out : (g + 1) * wide_out],
                h[:, g * wide_in : (g + 1) * wide_in],
            )
            for g in range(groups)
        ],
        axis=1,
    )
    return tuple(map(torch.tensor, (y, y.sum((0, 2, 3)), (y * y).sum((0, 2, 3)))))


def call(case, *, relu):
    return partial_pointwise_conv(**case, relu=relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"residual": False},
        {"affine": False, "residual": False, "touched": 0},
        {"touched": 1, "k": 5},
        {"touched": 8, "k": 7},
        {"touched": 0},
        {"groups": 2},
        {"c": 8, "out": 8, "groups": 8, "touched": 3},
        {"c": 1, "out": 1, "touched": 1, "h": 1, "w": 1, "n": 1, "k": 1},
        {"h": 1, "w": 13, "k": 7},
        {"n": 0},
        {"c": 5, "out": 17, "touched": 4},
    ],
    ids=str,
)
def test_values_equal_the_definition(options, relu):
    case = make_case(**options)
    got, want = call(case, relu=relu), definition(**case, relu=relu)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.data(),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape_equals_the_definition(n, c, h, w, data, relu, affine, residual):
    touched = data.draw(st.integers(0, c), label="touched")
    kernel = data.draw(st.sampled_from([1, 3, 5]), label="k")
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]), label="groups")
    case = make_case(n, c, h, w, touched, kernel, 2 * groups, groups, affine, residual)
    torch.testing.assert_close(
        call(case, relu=relu), definition(**case, relu=relu), rtol=1e-10, atol=1e-10
    )


def test_scale_and_shift_are_independent():
    case = make_case()
    for missing in ("scale", "shift"):
        part = {**case, missing: None}
        torch.testing.assert_close(call(part, relu=True), definition(**part, relu=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("touched", [0, 1, 4])
def test_gradcheck_through_all_three_outputs(touched, groups, relu):
    case = make_case(2, 4, 3, 2, touched, 3, 4, groups)
    names = [k for k, v in case.items() if isinstance(v, torch.Tensor)]

    def outputs(*tensors):
        return call({**case, **dict(zip(names, tensors, strict=True))}, relu=relu)

    leaves = [case[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_the_outputs(dtype):
    case = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in make_case().items()}
    y, sums, squares = call(case, relu=True)
    assert y.dtype == dtype
    assert sums.dtype == squares.dtype == torch.float32
    want, _, _ = definition(**case, relu=True)
    # h is rounded after each of scale, shift, residual and convolution, then y itself.
    scale = want.abs().max().item()
    assert (y.double() - want).abs().max().item() <= 8 * torch.finfo(dtype).eps * scale
    # The sums are those of the y that is returned, in fp32 whatever y is.
    torch.testing.assert_close(sums.double(), y.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        squares.double(), y.double().square().sum((0, 2, 3)), rtol=1e-5, atol=0
    )


def test_the_sums_are_what_batch_norm_needs():
    case = make_case(n=3)
    y, sums, squares = call(case, relu=True)
    count = y.numel() / y.shape[1]
    mean, variance = sums / count, squares / count - (sums / count) ** 2
    norm = torch.nn.BatchNorm2d(y.shape[1], affine=False).double()
    by_hand = (y - mean.view(1, -1, 1, 1)) / (variance + norm.eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(by_hand, norm(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("touched", [0, 2, 8])
def test_channels_last_in_channels_last_out(touched):
    case = make_case(touched=touched, out=8)
    last = {
        k: v.contiguous(memory_format=torch.channels_last) if k in ("x", "residual") else v
        for k, v in case.items()
    }
    got = call(last, relu=True)
    torch.testing.assert_close(got, call(case, relu=True), rtol=1e-12, atol=1e-12)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_M11_inputs_are_not_written():
    case = make_case()
    tensors = {k: v.requires_grad_() for k, v in case.items() if isinstance(v, torch.Tensor)}
    before = {k: (v._version, v.detach().clone()) for k, v in tensors.items()}
    sum(out.sum() for out in call(case, relu=True)).backward()
    for name, (version, value) in before.items():
        assert tensors[name]._version == version
        assert torch.equal(tensors[name], value)


def test_compiles_as_one_graph():
    case = make_case()
    leaf = case["x"].clone().requires_grad_()
    compiled = torch.compile(partial_pointwise_conv, fullgraph=True, backend="aot_eager")
    outputs = compiled(**{**case, "x": leaf}, relu=True)
    sum(out.sum() for out in outputs).backward()
    eager = case["x"].requires_grad_()
    expected = call(case, relu=True)
    sum(out.sum() for out in expected).backward()
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(leaf.grad, eager.grad)


# Partial convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4, 1 / 2, 1])
def test_M10_partial_conv_is_split_conv_cat(kernel, ratio):
    channels = 16
    touched = int(channels * ratio)
    x, weight = randn(2, channels, 9, 6), randn(touched, touched, kernel, kernel, seed=1)
    grad_y = randn(2, channels, 9, 6, seed=2)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = partial_conv(*leaves)
    y.backward(grad_y)

    expected = leaves[0].detach().requires_grad_(), leaves[1].detach().requires_grad_()
    first, rest = torch.split(expected[0], [touched, channels - touched], dim=1)
    conv = torch.nn.functional.conv2d(first, expected[1], padding=kernel // 2)
    torch.cat([conv, rest], dim=1).backward(grad_y)

    literal = torch.tensor(literal_conv(x[:, :touched].numpy(), weight.numpy()))
    torch.testing.assert_close(y[:, :touched], literal, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(leaves[0].grad, expected[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaves[1].grad, expected[1].grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(y[:, touched:], x[:, touched:]), "untouched channels must keep their bits"
    assert torch.equal(leaves[0].grad[:, touched:], grad_y[:, touched:])
    if kernel > 1:
        assert not torch.equal(y[:, :touched], x[:, :touched])


def test_M10_a_residual_of_the_same_tensor_survives():
    """FasterNet's slicing variant writes in place and spoils a shortcut; ours must not."""
    x = randn(1, 8, 4, 4)
    kept = x.clone()
    partial_conv(x, randn(2, 2, 3, 3))
    assert torch.equal(x, kept)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": randn(8, 5, 7)}, "x"),
        ({"x": torch.zeros(2, 8, 5, 7, dtype=torch.int64)}, "x"),
        ({"scale": randn(7)}, "scale"),
        ({"shift": randn(8, 1)}, "shift"),
        ({"residual": randn(2, 8, 5, 6)}, "residual"),
        ({"residual": randn(1, 8, 1, 1)}, "residual"),
        ({"partial_weight": randn(2, 2, 4, 4)}, "partial_weight"),
        ({"partial_weight": randn(2, 2, 3, 5)}, "partial_weight"),
        ({"partial_weight": randn(2, 3, 3, 3)}, "partial_weight"),
        ({"partial_weight": randn(9, 9, 3, 3)}, "partial_weight"),
        ({"partial_weight": randn(0, 0, 3, 3)}, "partial_weight"),
        ({"point_weight": randn(6, 7)}, "point_weight"),
        ({"point_weight": randn(6, 8, 1, 1)}, "point_weight"),
        ({"groups": 2}, "point_weight"),
        ({"groups": 0}, "point_weight"),
        ({"groups": 4, "point_weight": randn(6, 2)}, "point_weight"),
        ({"scale": torch.ones(8, device="meta")}, "scale"),
        ({"point_weight": torch.ones(6, 8, device="meta")}, "point_weight"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected .*got "):
        call({**make_case(), **change}, relu=True)
