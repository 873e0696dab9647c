"""frozen_conv2d: values and input gradient of F.conv2d, without keeping the input (2.4)."""

import pytest
import torch
import torch.nn.functional as F

from dfptkd.kernels import frozen_conv, frozen_conv2d

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
    weight = randn(c_out, c_in // options.get("groups", 1), *kernel).requires_grad_()
    return x, weight, randn(c_out).requires_grad_()


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
    torch.testing.assert_close(x.grad, want, rtol=0, atol=64 * torch.finfo(dtype).eps)
    assert weight.grad is None
    assert bias is None or bias.grad is None


def test_gradcheck():
    x, weight, bias = make_case(*CASES[3])
    assert torch.autograd.gradcheck(
        lambda x: frozen_conv2d(x, weight.detach(), bias.detach(), **CASES[3][-1]), x
    )


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
    control, _ = kept_for_backward(
        lambda: F.conv2d(x, weight.detach(), bias.detach(), padding=1)  # even with frozen weights
    )
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
        expected = F.conv2d(expected, weight.detach(), padding=1).relu()
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
    (want,) = torch.autograd.grad(F.conv2d(x, weight, padding=1), x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want)


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
        want = F.conv2d(F.conv2d(x, weight, bias, padding=1).relu()[:, :3], weight, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    (expected,) = torch.autograd.grad(want.float().sum(), x)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    scale = expected.abs().max().item()
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=4 * eps * scale)
    assert weight.grad is None


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
    assert weight.grad is None


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
