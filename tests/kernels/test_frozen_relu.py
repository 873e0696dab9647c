"""frozen_relu: values and gradients of torch's ReLU and ReLU6 from one bit an element."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dfptkd.kernels import backend, frozen_relu, use_backend

NO_NATIVE = backend.unavailable("native")
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
SPECIAL = [0.0, -0.0, 6.0, -6.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 5.9999995, 6.0000005]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def make_x(shape=(3, 5, 7, 9), dtype=torch.float32, seed=0):
    """Normal numbers around both ends, and every special value."""
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    flat = x.flatten()
    flat[: len(SPECIAL)] = torch.tensor(SPECIAL)[: len(flat)]
    return flat.reshape(shape).to(dtype)


def torchs_own(x, limit):
    if limit is None:
        return F.relu(x)
    return F.relu6(x) if limit == 6 else F.hardtanh(x, 0.0, limit)


def results(function, x, grad_y):
    x = x.detach().requires_grad_()
    y = function(x)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    return y, grad_x


def expected_results(x, grad_y, limit):
    """Torch's; but NaN passes its gradient as through F.relu, where F.relu6 takes its choice
    between its scalar and its vector loop."""
    y, grad_x = results(lambda x: torchs_own(x, limit), x, grad_y)
    return y, torch.where(x.isnan(), grad_y, grad_x)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def kept_for_backward(function):
    """Bytes of the storages that the graph of function() keeps alive."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("limit", [None, 6.0, 2.5])
def test_value_and_gradient_are_torchs_own(name, layout, limit):
    x = LAYOUTS[layout](make_x())
    grad_y = make_x(seed=1)
    with use_backend(name):
        found = results(lambda x: frozen_relu(x, limit), x, grad_y)
    assert_same(found, expected_results(x, grad_y, limit))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [None, 6.0])
def test_other_dtypes(dtype, limit):
    x, grad_y = make_x(dtype=dtype), make_x(dtype=dtype, seed=1)
    found = results(lambda x: frozen_relu(x, limit), x, grad_y)
    assert found[0].dtype == found[1].dtype == dtype
    assert_same(found, expected_results(x, grad_y, limit))


@needs_native
@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 300), limit=st.sampled_from([None, 6.0]), seed=st.integers(0, 2**16))
def test_every_size_around_a_byte_and_a_block(size, limit, seed):
    x, grad_y = make_x((size,), seed=seed), make_x((size,), seed=seed + 1)
    with use_backend("native"):
        found = results(lambda x: frozen_relu(x, limit), x, grad_y)
    assert_same(found, expected_results(x, grad_y, limit))


@needs_native
def test_a_large_tensor_is_split_at_whole_bytes():
    x, grad_y = make_x((3, 100_003)), make_x((3, 100_003), seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with use_backend("native"):
            found = results(frozen_relu, x, grad_y)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, results(F.relu, x, grad_y))


@needs_native
def test_bits_are_packed_in_memory_order_lowest_first():
    x = make_x((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    _, bits = torch.ops.dfptkd.frozen_relu_forward(x, None)
    in_memory = x.permute(0, 2, 3, 1).flatten()
    flags = ~(in_memory <= 0)
    expected = (flags.reshape(-1, 8).int() << torch.arange(8)).sum(1).to(torch.uint8)
    assert torch.equal(bits, expected)
    assert 0 < bits.sum() < 255 * len(bits)


@needs_native
def test_one_bit_an_element_is_kept():
    x = make_x((4, 8, 16, 16)).requires_grad_()
    assert kept_for_backward(lambda: frozen_relu(x)) == x.numel() // 8
    assert kept_for_backward(lambda: F.relu(x)) == 4 * x.numel()
    with use_backend("reference"):
        assert kept_for_backward(lambda: frozen_relu(x, 6.0)) == x.numel()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_is_kept_whatever_the_gradients_is(name, layout):
    x = LAYOUTS[layout](make_x())
    for other in LAYOUTS:
        grad_y = LAYOUTS[other](make_x(seed=1))
        with use_backend(name):
            y, grad_x = results(frozen_relu, x, grad_y)
        assert y.stride() == grad_x.stride() == x.stride()
        assert_same(grad_x, results(F.relu, x, grad_y)[1])


@pytest.mark.parametrize("limit", [None, 6.0])
def test_without_a_gradient_it_is_torchs_operation(limit):
    x = make_x()
    assert kept_for_backward(lambda: frozen_relu(x, limit)) == 0
    with torch.no_grad():
        y = frozen_relu(x.requires_grad_(), limit)
    assert not y.requires_grad
    assert_same(y, torchs_own(x.detach(), limit))


@pytest.mark.parametrize("limit", [None, 6.0])
def test_gradcheck(limit):
    x = make_x((4, 6), torch.float64)
    x[~x.isfinite() | (x.abs() < 0.1) | ((x - 6).abs() < 0.1)] = 1.0
    assert torch.autograd.gradcheck(lambda x: frozen_relu(x, limit), x.requires_grad_())


@pytest.mark.parametrize("name", BACKENDS)
def test_M11_inputs_are_not_written_and_the_result_may_be(name):
    x, grad_y = make_x(), make_x(seed=1)
    before = x.clone(), grad_y.clone()
    leaf = x.requires_grad_()
    with use_backend(name):
        y = frozen_relu(leaf)
    expected = y.detach().clone()
    y.detach().zero_()  # the backward needs no activation
    y.backward(grad_y)
    assert_same((x.detach(), grad_y), before)
    assert_same(x.grad, torch.where(expected == 0, 0, grad_y))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_derivative_is_refused(name):
    x = make_x((4, 4)).requires_grad_()
    with use_backend(name):
        y = frozen_relu(x)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


@needs_native
@pytest.mark.parametrize("limit", [None, 6.0])
def test_operators_pass_opcheck(limit):
    x = make_x().contiguous(memory_format=torch.channels_last).nan_to_num()
    _, bits = torch.ops.dfptkd.frozen_relu_forward(x, limit)
    torch.library.opcheck(torch.ops.dfptkd.frozen_relu_forward, (x, limit))
    torch.library.opcheck(torch.ops.dfptkd.frozen_relu_backward, (x, bits))
    torch.library.opcheck(torch.ops.dfptkd.frozen_relu, (x.requires_grad_(), limit))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other"])
def test_compiles_as_one_graph(name, layout):
    torch._dynamo.reset()
    seen = []

    def compiler(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, grad_y = LAYOUTS[layout](make_x()), make_x(seed=1)
    with use_backend(name):
        expected = results(frozen_relu, x, grad_y)
        for by in ("aot_eager", compiler):
            compiled = torch.compile(frozen_relu, fullgraph=True, backend=by)
            assert_same(results(compiled, x, grad_y), expected)
    assert any("dfptkd.frozen_relu" in target for target in seen) == (name == "native")


def test_compiled_on_cuda_no_operator_stands_between_inductor_and_its_neighbours(monkeypatch):
    monkeypatch.setitem(backend._AUTOMATIC, "cpu", "triton")  # a stand-in of a GPU
    monkeypatch.setattr(backend, "_find_triton", lambda: None)
    torch._dynamo.reset()
    seen = []

    def compiler(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, grad_y = make_x(), make_x(seed=1)
    with use_backend("reference"):
        expected = results(frozen_relu, x, grad_y)
    for by in ("aot_eager", compiler):
        compiled = torch.compile(frozen_relu, fullgraph=True, backend=by)
        assert_same(results(compiled, x, grad_y), expected)
    assert seen
    assert not any("dfptkd" in target for target in seen)


@needs_native
def test_operators_stay_in_bounds():
    x = make_x((4, 8))
    y, bits = torch.ops.dfptkd.frozen_relu_forward(x, None)
    with pytest.raises(RuntimeError, match="must be dense"):
        torch.ops.dfptkd.frozen_relu_forward(x[:, ::2], None)
    with pytest.raises(RuntimeError, match="must be dense"):
        torch.ops.dfptkd.frozen_relu_backward(y[:1].expand(4, 8), bits)
    with pytest.raises(RuntimeError, match="a byte for 8 elements"):
        torch.ops.dfptkd.frozen_relu_backward(y, bits[:-1])
    with pytest.raises(RuntimeError, match="takes fp32"):
        torch.ops.dfptkd.frozen_relu_forward(x.double(), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3).int(),), "x: expected a floating dtype"),
        ((torch.zeros(3), 0.0), "limit: expected a number above 0"),
        ((torch.zeros(3), math.nan), "limit: expected a number above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        frozen_relu(*arguments)
