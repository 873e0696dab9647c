"""frozen_conv2d: values and input gradient of F.conv2d, without keeping the input (2.4)."""

import pytest
import torch
import torch.nn.functional as F
from error_bounds import Computed, RootMeanSquares, exact, excess, products
from torch.utils.flop_counter import FlopCounterMode

from dfptkd.kernels import backend, frozen_conv, frozen_conv2d, use_backend
from dfptkd.kernels.backend import Choices, Site, use_choices

# C_in, C_out, kernel, size, options
CASES = [
    (3, 8, (3, 3), (9, 7), {"padding": 1}),
    (8, 8, (1, 1), (5, 5), {}),
    (8, 16, (1, 1), (6, 6), {"stride": 2}),
    (4, 6, (3, 3), (8, 8), {"stride": 2, "padding": 1}),
    (4, 6, (3, 3), (9, 9), {"stride": 2, "padding": 1}),
    (4, 6, (7, 7), (15, 16), {"stride": 2, "padding": 3}),
    (6, 6, (3, 3), (8, 8), {"padding": 1, "groups": 6}),
    (6, 4, (3, 3), (8, 8), {"padding": 2, "dilation": 2, "groups": 2}),
    (2, 3, (3, 5), (11, 10), {"stride": (2, 3), "padding": (0, 2), "dilation": (3, 1)}),
]


def make_case(c_in, c_out, kernel, size, options, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = randn(batch, c_in, *size).requires_grad_()
    weight = randn(c_out, c_in // options.get("groups", 1), *kernel)
    return x, weight, randn(c_out)


def input_gradient_bounds(x, weight, grad_y, **options):
    """The input gradient by its definition."""

    def transposed(grad_y, weight):
        return torch.nn.grad.conv2d_input(x.shape, weight, grad_y, **options)

    terms = weight[:, 0].numel() // options.get("groups", 1)
    unit = torch.finfo(weight.dtype).eps / 2
    return products(transposed, exact(grad_y, unit), exact(weight, unit), terms=terms)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_input_gradient_equal_autograds(case, with_bias, dtype):
    x, weight, bias = make_case(*case, dtype=dtype)
    bias = bias if with_bias else None
    y = frozen_conv2d(x, weight, bias, **case[-1])
    expected = F.conv2d(x, weight, bias, **case[-1])
    assert torch.equal(y, expected)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (want,) = torch.autograd.grad(expected, x, grad_y)
    y.backward(grad_y)
    bounds = input_gradient_bounds(x, weight, grad_y, **case[-1])
    for gradient in (x.grad, want):  # twice: what is exact for fp32 is rounded, too, for fp64
        assert excess(gradient, bounds) <= 2
    assert excess(x.grad.roll(1, 3), bounds) >= 100


def test_gradcheck():
    x, weight, bias = make_case(*CASES[3])
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, weight, bias, **CASES[3][-1]), x)


def kept_for_backward(function):
    """Storages that the graph of function() keeps alive."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return kept, output


def test_the_input_is_not_kept_for_the_backward():
    x, weight, bias = make_case(*CASES[0], batch=32)
    address = x.untyped_storage().data_ptr()
    kept, y = kept_for_backward(lambda: frozen_conv2d(x, weight, bias, padding=1))
    assert sum(kept.values()) == weight.untyped_storage().nbytes()
    assert address not in kept
    control, _ = kept_for_backward(lambda: F.conv2d(x, weight, bias, padding=1))
    assert address in control
    # What is kept is enough: the input may change before the backward runs.
    (want,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).sum(), x)
    with torch.no_grad():
        x.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_a_chain_of_frozen_convolutions():
    x, weight, _ = make_case(8, 8, (3, 3), (6, 6), {})
    expected = x
    y = x
    for _ in range(3):
        expected = F.conv2d(expected, weight, padding=1).relu()
        y = frozen_conv2d(y, weight, padding=1).relu()
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(got, want)


def test_no_graph_where_the_input_needs_none():
    x, weight, bias = make_case(*CASES[0])
    assert not frozen_conv2d(x.detach(), weight, bias, padding=1).requires_grad


def test_without_a_gradient_it_is_torchs_operation(monkeypatch):
    def refuse(*_):
        raise AssertionError("the frozen path was taken")

    monkeypatch.setattr(frozen_conv._FrozenConv2d, "apply", refuse)
    x, weight, bias = make_case(*CASES[0])
    want = F.conv2d(x, weight, bias, padding=1)
    with torch.no_grad():
        assert torch.equal(frozen_conv2d(x, weight, bias, padding=1), want)
    assert torch.equal(frozen_conv2d(x.detach(), weight, bias, padding=1), want)
    with pytest.raises(AssertionError, match="frozen path"):
        frozen_conv2d(x, weight, bias, padding=1)


def test_runs_on_the_meta_device():
    """Costs are counted there; autocast does not know it."""
    x = torch.empty(2, 3, 9, 7, device="meta", requires_grad=True)
    y = frozen_conv2d(x, torch.empty(8, 3, 3, 3, device="meta"), padding=1)
    y.sum().backward()
    assert y.shape == (2, 8, 9, 7)
    assert x.grad.shape == x.shape


def test_an_empty_batch():
    x, weight, bias = make_case(*CASES[0], batch=0)
    y = frozen_conv2d(x, weight, bias, padding=1)
    y.sum().backward()
    assert y.shape == (0, 8, 9, 7)
    assert x.grad.shape == x.shape


def test_channels_last_stays_channels_last():
    x, weight, _ = (t.detach() for t in make_case(8, 8, (3, 3), (6, 6), {}, dtype=torch.float32))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = frozen_conv2d(x, weight, padding=1)
    (got,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert excess(got, input_gradient_bounds(x, weight, torch.ones_like(y), padding=1)) <= 1


def test_M11_inputs_are_not_written():
    inputs = make_case(*CASES[0])
    before = [(t._version, t.detach().clone()) for t in inputs]
    frozen_conv2d(*inputs, padding=1).sum().backward()
    for tensor, (version, value) in zip(inputs, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)


def test_a_weight_written_before_the_backward_is_refused():
    x, weight, _ = make_case(*CASES[0])
    y = frozen_conv2d(x, weight, padding=1)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_runs_under_autocast():
    """The engine's mixed precision: fp32 weights, activations in fp32 or bf16."""
    x, weight, bias = make_case(*CASES[0], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_conv2d(
            frozen_conv2d(x, weight, bias, padding=1).relu()[:, :3], weight, padding=1
        )
        middle = F.conv2d(x, weight, bias, padding=1).relu()[:, :3]
        want = F.conv2d(middle, weight, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert weight.grad is None
    low = weight.bfloat16()
    ones = torch.ones_like(y)
    upstream = input_gradient_bounds(middle, low.float(), ones.float(), padding=1)
    upstream = upstream.stored(torch.bfloat16)
    is_on = exact(middle > 0)
    upstream = Computed(upstream.value * is_on.value, upstream.error * is_on.value)

    def transposed(grad, weight):
        return torch.nn.grad.conv2d_input(x.shape, weight[:3], grad, padding=1)

    expected = products(transposed, upstream, exact(low), terms=27).stored(torch.bfloat16)
    assert excess(x.grad, expected) <= 1
    assert excess(x.grad.roll(1, 3), expected) >= 10


def test_fp64_is_left_alone_by_autocast_as_by_torch():
    x, weight, bias = make_case(*CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_conv2d(x, weight, bias, padding=1)
        want = F.conv2d(x, weight, bias, padding=1)
    assert y.dtype == want.dtype == torch.float64
    assert torch.equal(y, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph_in_either_precision(autocast):
    torch._dynamo.reset()
    x, weight, bias = make_case(*CASES[3], dtype=torch.float32)
    compiled = torch.compile(frozen_conv2d, fullgraph=True, backend="aot_eager")
    results = []
    for function in (frozen_conv2d, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x, weight, bias, **CASES[3][-1])
        results.append((y, *torch.autograd.grad(y.float().sum(), x)))
    assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(results[1], results[0])


def test_compiles_as_one_graph():
    x, weight, bias = make_case(*CASES[3])
    expected = frozen_conv2d(x, weight, bias, **CASES[3][-1])
    (want,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(frozen_conv2d, fullgraph=True, backend="aot_eager")
    y = compiled(x, weight, bias, **CASES[3][-1])
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(3, 9, 7)}, "x"),
        ({"x": torch.zeros(2, 4, 9, 7)}, "x"),
        ({"weight": torch.zeros(8, 3, 3)}, "weight"),
        ({"groups": 2}, "groups|C / 2"),
        ({"weight": torch.zeros(8, 3, 3, 3).double()}, "weight"),
        ({"weight": torch.zeros(8, 3, 3, 3, device="meta")}, "weight"),
        ({"bias": torch.zeros(7)}, "bias"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, named):
    arguments = {"x": torch.zeros(2, 3, 9, 7), "weight": torch.zeros(8, 3, 3, 3), **change}
    with pytest.raises(ValueError, match=named):
        frozen_conv2d(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_constant_that_asks_for_a_gradient_is_refused(name):
    x, weight, bias = make_case(*CASES[0])
    {"weight": weight, "bias": bias}[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: requires grad, .* expected it detached$"):
        frozen_conv2d(x, weight, bias, padding=1)
    with torch.no_grad():  # nothing asks for one here
        frozen_conv2d(x, weight, bias, padding=1)


# The native backend
# -----------------------------------------------------------------------

needs_native = pytest.mark.skipif(
    backend.unavailable("native") is not None, reason=str(backend.unavailable("native"))
)
NATIVE = torch.ops.dfptkd.frozen_conv3x3_native.default
# [N, C, H, W], C_out: whole and partial tiles and vectors, one and several blocks.
SHAPES = [
    (2, 1, 1, 1, 1),
    (1, 1, 5, 4, 256),
    (3, 256, 6, 5, 1),
    (2, 3, 9, 7, 16),
    (2, 16, 32, 32, 16),
    (1, 17, 1, 33, 40),
    (1, 33, 33, 1, 7),
    (2, 31, 4, 3, 33),
    (4, 16, 4, 4, 256),
    (4, 256, 4, 5, 17),
    (2, 32, 32, 32, 32),
    (2, 48, 13, 11, 20),
    (2, 64, 16, 16, 64),
    (3, 128, 8, 8, 128),
    (1, 100, 33, 33, 15),
    (2, 256, 7, 7, 256),
]


def make_3x3(shape, *, is_post_relu=False):
    """x, weight, bias and the output's gradient, in fp32 and channels_last."""
    *sizes, c_out = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x = randn(*sizes).contiguous(memory_format=torch.channels_last)
    weight = randn(c_out, sizes[1], 3, 3).contiguous(memory_format=torch.channels_last)
    grad_y = randn(sizes[0], c_out, *sizes[2:]).contiguous(memory_format=torch.channels_last)
    return x.relu() if is_post_relu else x, weight, randn(c_out), grad_y


def in_both_directions(x, weight, bias, grad_y):
    x = x.detach().requires_grad_()
    y = frozen_conv2d(x, weight, bias, padding=1)
    return y.detach(), *torch.autograd.grad(y, x, grad_y)


def winograd_bounds(x, weight, bias=None):
    """F(2x2, 3x3) of csrc/frozen_conv.cpp, step by step: transforms, sums over channels, and back.

    Its errors are larger than those of the definition where the terms of a transform cancel, as
    zeros around the image do not.
    """
    to_tiles = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1.0]])
    to_weights = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1.0]])
    to_outputs = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1.0]])

    def both_sides(numbers, matrix, terms):
        """matrix numbers matrix', one side after the other."""
        matrix = exact(matrix)
        half = products(lambda a, m: m @ a, numbers, matrix, terms=terms)
        return products(lambda a, m: a @ m.mT, half, matrix, terms=terms)

    height, width = x.shape[2:]
    padded = F.pad(x.double(), (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = both_sides(exact(padded.unfold(2, 4, 2).unfold(3, 4, 2)), to_tiles, 2)
    weights = both_sides(exact(weight), to_weights, 3)

    def over_channels(tiles, weights):
        return torch.einsum("nchwij,ocij->nohwij", tiles, weights)

    summed = products(over_channels, tiles, weights, terms=x.shape[1])
    found = both_sides(summed, to_outputs, 3)

    def untiled(t):
        return t.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[:, :, :height, :width]

    y = Computed(untiled(found.value), untiled(found.error))
    return y if bias is None else y + exact(bias).reshape(1, -1, 1, 1)


def native_bounds(x, weight, bias, grad_y):
    """Of the native kernel in both directions."""
    return winograd_bounds(x, weight, bias), winograd_bounds(
        grad_y, weight.transpose(0, 1).flip(2, 3)
    )


@needs_native
@pytest.mark.parametrize("is_post_relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_of_the_native_kernel_are_within_those_of_rounding(shape, is_post_relu):
    case = make_3x3(shape, is_post_relu=is_post_relu)
    with use_backend("native"):
        found = in_both_directions(*case)
    with use_backend("reference"):
        truth = in_both_directions(*(tensor.double() for tensor in case))
    for ours, true, expected in zip(found, truth, native_bounds(*case), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert excess(true, expected) <= 1e-6  # the same function, by the definition
        assert excess(ours, expected) <= 1


@needs_native
@pytest.mark.parametrize("is_post_relu", [False, True])
def test_errors_of_the_native_kernel_are_at_most_twice_onednns(is_post_relu):
    """Their root mean square; images under 4 x 4 are oneDNN's unless native is asked for."""
    means = RootMeanSquares()
    for shape in SHAPES:
        case = make_3x3(shape, is_post_relu=is_post_relu)
        with use_backend("reference"):
            truth = in_both_directions(*(tensor.double() for tensor in case))
        for name in ("native", "reference"):
            with use_backend(name):
                found = in_both_directions(*case)
            for direction, y, true in zip(("forward", "backward"), found, truth, strict=True):
                if min(shape[2:4]) >= 4:  # below, most taps of the definition meet zeros
                    means.add(f"{name} {direction}", y, true)
    for direction in ("forward", "backward"):
        ours, onednn = means[f"native {direction}"], means[f"reference {direction}"]
        print(f"{direction}: {ours:.2g} {onednn:.2g}")
        assert ours <= 2 * onednn


@needs_native
def test_the_bounds_tell_a_wrong_kernel_apart():
    """Negative controls: a tap or a channel left out, off by one pixel, inputs cut to bf16."""
    x, weight, bias, _ = make_3x3((2, 64, 16, 16, 64))
    expected = winograd_bounds(x, weight, bias)
    one_tap, one_channel = weight.clone(), x.clone()
    one_tap[5, 7, 2, 0] = 0
    one_channel[:, 9] = 0
    for wrong in [
        (x, one_tap, bias),
        (one_channel, weight, bias),
        (x.roll(1, 3).contiguous(memory_format=torch.channels_last), weight, bias),
        (x, weight, bias.roll(1)),
        (x.bfloat16().float(), weight.bfloat16().float(), bias),
    ]:
        found = excess(NATIVE(*wrong, False), expected)
        print(f"{found:.0f}")
        assert found >= 100


@needs_native
def test_layouts_of_the_weight_and_of_the_gradient_do_not_matter():
    x, weight, bias, grad_y = make_3x3((2, 31, 9, 10, 33))
    with use_backend("native"):
        want = in_both_directions(x, weight, bias, grad_y)
        for change in (torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT):
            found = in_both_directions(x, change(weight), bias, change(grad_y))
            assert all(map(torch.equal, found, want))
        assert torch.equal(NATIVE(x, weight, None, False) + bias[:, None, None], want[0])


@needs_native
@pytest.mark.parametrize("shape", [(3, 48, 13, 11, 20), (5, 64, 16, 16, 64)], ids=str)
def test_bits_depend_on_neither_repeats_threads_nor_the_batch(shape):
    case = make_3x3(shape)
    threads = torch.get_num_threads()
    with use_backend("native"):
        want = in_both_directions(*case)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(map(torch.equal, in_both_directions(*case), want))
        finally:
            torch.set_num_threads(threads)
        x, weight, bias, grad_y = case
        for i in range(shape[0]):
            found = in_both_directions(x[i : i + 1], weight, bias, grad_y[i : i + 1])
            assert all(torch.equal(a[0], b[i]) for a, b in zip(found, want, strict=True))


@needs_native
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pixel", [(0, 0), (4, 7), (5, 6), (11, 12)])
def test_a_nan_or_an_infinity_reaches_what_it_does_by_the_definition(value, pixel):
    x, weight, bias, _ = make_3x3((1, 16, 12, 13, 16))
    finite = NATIVE(x, weight, bias, False)
    row, col = pixel
    x[0, 3, row, col] = value
    found = NATIVE(x, weight, bias, False)
    is_reached = ~F.conv2d(x, weight, bias, padding=1).isfinite()
    assert torch.equal(~found.isfinite(), is_reached)
    assert torch.equal(found[~is_reached], finite[~is_reached])


def taken(monkeypatch, *inputs, **options):
    """Whether a call reaches the native kernel."""
    calls = []

    def note(*inputs):
        calls.append(inputs)
        return NATIVE(*inputs)

    monkeypatch.setattr(frozen_conv, "_native", note)
    frozen_conv2d(*inputs, **options)
    return bool(calls)


@needs_native
def test_the_native_kernel_is_taken_where_it_serves_and_was_asked_for(monkeypatch):
    x, weight, bias, _ = make_3x3((2, 16, 16, 16, 16))
    same = {"padding": 1}
    assert not taken(monkeypatch, x, weight, bias, **same)
    with use_backend("native"):
        assert taken(monkeypatch, x, weight, bias, **same)
        assert taken(monkeypatch, x.clone().requires_grad_(), weight, bias, **same)
        for tensors, options in [
            ((x, weight, bias), {"padding": 1, "exact": True}),
            ((x, weight, bias), {"padding": 0}),
            ((x, weight, bias), {"padding": 1, "stride": 2}),
            ((x, weight, bias), {"padding": 2, "dilation": 2}),
            ((x, weight[:, :8], bias), {"padding": 1, "groups": 2}),
            ((x, weight[..., :1], bias), {"padding": (1, 0)}),
            ((x.contiguous(), weight, bias), same),
        ]:
            assert not taken(monkeypatch, *tensors, **options)
    site = Site("frozen_conv2d", "cpu", x.dtype, (16, 16, 16), (16, "bias"))
    with use_choices(Choices({site: "native"})):
        assert taken(monkeypatch, x, weight, bias, **same)
        assert taken(monkeypatch, torch.cat([x, x])[:3], weight, bias, **same)
        assert not taken(monkeypatch, x.clone().requires_grad_(), weight, bias, **same)
        assert not taken(monkeypatch, x, weight, None, **same)
        with use_backend("reference"):
            assert not taken(monkeypatch, x, weight, bias, **same)


@needs_native
def test_the_exact_convolution_has_torchs_bits():
    x, weight, bias, _ = make_3x3((2, 32, 16, 16, 32))
    want = F.conv2d(x, weight, bias, padding=1)
    with use_backend("native"):
        assert not torch.equal(frozen_conv2d(x, weight, bias, padding=1), want)
        for pixels in (x, x.clone().requires_grad_()):
            assert torch.equal(frozen_conv2d(pixels, weight, bias, padding=1, exact=True), want)


@needs_native
def test_the_native_backend_keeps_the_weight_alone():
    x, weight, bias, _ = make_3x3((2, 32, 16, 16, 32))
    x.requires_grad_()
    kept, _ = kept_for_backward(lambda: frozen_conv2d(x, weight, bias, padding=1))
    assert kept == {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()}


@needs_native
def test_empty_batches_and_images_are_served_natively():
    for shape in [(0, 16, 8, 8, 32), (2, 16, 0, 8, 32)]:
        x, weight, bias, grad_y = make_3x3(shape)
        assert NATIVE(x, weight, bias, False).shape == grad_y.shape
        assert NATIVE(grad_y, weight, None, True).shape == x.shape


@needs_native
def test_flops_are_those_of_the_definition():
    x, weight, bias, _ = make_3x3((2, 32, 16, 16, 32))
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter, use_backend("native"):
        frozen_conv2d(x, weight, bias, padding=1).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 16 * 16 * 32 * 32 * 9


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_passes_opcheck(transposed, with_bias):
    x, weight, bias, _ = make_3x3((2, 7, 9, 10, 7))
    inputs = (x.requires_grad_(), weight, bias if with_bias else None, transposed)
    torch.library.opcheck(torch.ops.dfptkd.frozen_conv3x3.default, inputs)


@needs_native
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_native_backend_compiles_as_one_graph(compiler):
    torch._dynamo.reset()
    case = make_3x3((2, 32, 16, 16, 32))
    with use_backend("native"):
        want = in_both_directions(*case)
    x, weight, bias, grad_y = case
    compiled = torch.compile(frozen_conv2d, fullgraph=True, backend=compiler)
    with torch.no_grad(), use_backend("native"):
        assert torch.equal(compiled(x, weight, bias, padding=1), want[0])
    with use_backend("native"):
        y = compiled(x.requires_grad_(), weight, bias, padding=1)
    assert torch.equal(y, want[0])
    assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], want[1])


@needs_native
def test_the_operator_refuses_what_does_not_fit():
    x, weight, bias, _ = make_3x3((2, 16, 8, 8, 32))
    for inputs in [
        (x[0], weight, bias, False),
        (x, weight, bias, True),
        (x, weight[..., :2], bias, False),
        (x, weight, bias[1:], False),
        (x.double(), weight, bias, False),
        (x[:, :0], weight[:, :0], bias, False),
    ]:
        with pytest.raises(RuntimeError, match="frozen_conv3x3"):
            NATIVE(*inputs)
