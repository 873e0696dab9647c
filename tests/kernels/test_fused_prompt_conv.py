"""The native prompt-path kernels against float64, within what rounding explains (M9, M10)."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from error_bounds import RootMeanSquares, excess
from prompt_conv_bounds import batch_norm_bounds, partial_pointwise_conv_bounds
from torch.utils.flop_counter import FlopCounterMode

from dfptkd.kernels import backend, partial_pointwise_conv, use_backend, which_backend
from dfptkd.kernels.batch_norm import affine_relu, batch_norm_affine

NO_NATIVE = backend.unavailable("native")
pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

CHANNELS = (1, 3, 8, 20, 33, 64)
SIZES = ((1, 1), (2, 3), (5, 7), (8, 8), (1, 33), (14, 14), (33, 9), (17, 16))


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    size: tuple[int, int]
    touched: int
    kernel: int
    out: int
    groups: int
    relu: bool
    parts: str
    """Of "scale", "shift" and "residual" those that are there."""

    def __str__(self):
        return "-".join(str(value) for value in vars(self).values()).replace(" ", "")


def covering_set():
    """Every number of channels with every image size; the other options in unequal cycles."""
    parts = ("scale shift", "", "shift residual", "scale shift residual", "scale")
    cases = []
    for i, (channels, size) in enumerate(itertools.product(CHANNELS, SIZES)):
        groups = next(g for g in (4, 2, 1)[i % 3 :] if channels % g == 0)
        touched = (0, 1, channels, max(channels // 4, 1), max(channels // 2, 1), min(channels, 6))
        cases.append(
            Case(
                batch=(1, 3, 17)[i // 2 % 3],
                channels=channels,
                size=size,
                touched=touched[(i + i // 6) % 6],
                kernel=(3, 5, 7, 1)[(i + i // 4) % 4],
                out=groups * (1, 4, 16, 19)[(i + i // 8) % 4],
                groups=groups,
                relu=i % 7 % 2 == 0,
                parts=parts[(i + i // 5) % 5],
            )
        )
    return cases


def tensors_of(case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n, c, (h, w), k = case.batch, case.channels, case.size, case.kernel
    found = {
        "x": randn(n, c, h, w),
        "scale": 1 + 0.3 * randn(c),
        "shift": 0.3 * randn(c),
        "partial_weight": randn(case.touched, case.touched, k, k) / (k * case.touched**0.5 or 1),
        "point_weight": randn(case.out, c // case.groups) / (c // case.groups) ** 0.5,
        "residual": randn(n, c, h, w),
    }
    absent = {"scale", "shift", "residual"} - set(case.parts.split())
    if case.touched == 0:
        absent.add("partial_weight")
    return {name: None if name in absent else value for name, value in found.items()}


def upstream(case, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = (case.batch, case.out, *case.size), (case.out,), (case.out,)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def run(case, dtype, name):
    """Outputs and gradients by name, from the same numbers rounded to `dtype`."""
    tensors = {
        k: None if v is None else v.float().to(dtype).requires_grad_()
        for k, v in tensors_of(case).items()
    }
    with use_backend(name):
        outputs = partial_pointwise_conv(**tensors, relu=case.relu, groups=case.groups)
    grads = [g.float().to(dtype) for g in upstream(case, dtype)]
    leaves = {k: v for k, v in tensors.items() if v is not None}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = dict(zip(("y", "sums", "squared_sums"), outputs, strict=True))
    return {k: v.detach() for k, v in named.items()} | dict(zip(leaves, found, strict=True))


def bounds(case, returned_y):
    """What each output and gradient of `run` in fp32 may be, given its own y."""
    tensors = {k: None if v is None else v.float() for k, v in tensors_of(case).items()}
    grads = [g.float() for g in upstream(case, torch.float64)]
    return partial_pointwise_conv_bounds(
        tensors, grads, returned_y, relu=case.relu, groups=case.groups
    )


@pytest.mark.parametrize("case", covering_set(), ids=str)
def test_errors_are_within_those_of_rounding(case):
    ours = run(case, torch.float32, "native")
    expected = bounds(case, ours["y"])
    assert ours.keys() == expected.keys()
    for name, found in ours.items():
        assert excess(found, expected[name]) <= 1, name


def test_errors_are_at_most_twice_those_of_eager():
    """Their root mean square over all cases: either side is now and then exact by luck."""
    means, names = RootMeanSquares(), {}
    for case in covering_set():
        exact = run(case, torch.float64, "reference")
        for served_by in ("native", "reference"):
            for name, value in run(case, torch.float32, served_by).items():
                means.add(f"{served_by} {name}", value, exact[name])
        names |= exact
    for name in names:
        ours, eager = means[f"native {name}"], means[f"reference {name}"]
        print(f"{name}: {ours:.1e} {eager:.1e}")
        assert ours <= 2 * eager, name


@pytest.mark.parametrize("case", covering_set()[::5], ids=str)
def test_the_bounds_are_those_of_the_reference(case):
    """The equations that they follow give what autograd gives."""
    exact = run(case, torch.float64, "reference")
    expected = bounds(case, exact["y"])
    for name, value in exact.items():
        assert excess(value, expected[name]) <= 1e-6, name


COMMON = Case(3, 16, (9, 7), 4, 5, 12, 2, True, "scale shift residual")


def tap(tensors):
    tensors["partial_weight"][1, 2, 0, 4] = 0


def channel(tensors):
    tensors["point_weight"][:, 5] = 0


def pixel(tensors):
    tensors["residual"] = tensors["residual"].roll(1, 3)


def precision(tensors):
    tensors |= {name: t.bfloat16().to(t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("slip", [tap, channel, pixel, precision])
def test_the_bounds_tell_a_wrong_kernel_apart(slip, monkeypatch):
    """Negative controls: a tap or a channel left out, off by one pixel, inputs cut to bf16."""
    expected = bounds(COMMON, run(COMMON, torch.float32, "native")["y"])
    wrong = tensors_of(COMMON)
    slip(wrong)
    monkeypatch.setitem(globals(), "tensors_of", lambda _: wrong)
    found = run(COMMON, torch.float32, "native")
    excesses = {name: excess(value, expected[name]) for name, value in found.items()}
    print({name: f"{value:.0f}" for name, value in excesses.items()})
    assert all(value >= 100 for value in excesses.values()), excesses


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 0), (torch.bfloat16, 100), (torch.float16, 100)], ids=str
)
def test_the_bounds_tell_sums_in_half_precision_apart(dtype, least):
    """Negative control: products added up one by one in that dtype; in fp32 they pass."""
    tensors = tensors_of(COMMON, torch.float32)
    scale, shift = (tensors[name].view(1, -1, 1, 1) for name in ("scale", "shift"))
    h = (tensors["x"] * scale + shift).relu() + tensors["residual"]
    weight, point = tensors["partial_weight"], tensors["point_weight"]

    def convolved(h, weight):
        k, (height, width) = weight.shape[-1], h.shape[2:]
        padded = torch.nn.functional.pad(h, [k // 2] * 4)
        total = torch.zeros(h.shape[0], weight.shape[0], height, width)
        for row, column, c in itertools.product(range(k), range(k), range(h.shape[1])):
            taken = padded[:, c, None, row : row + height, column : column + width]
            product = weight[:, c, row, column].view(1, -1, 1, 1) * taken
            total = (total + product).to(dtype).float()
        return total

    touched, outs = COMMON.touched, COMMON.out // COMMON.groups
    h = torch.cat([convolved(h[:, :touched], weight), h[:, touched:]], 1)
    parts = zip(h.chunk(COMMON.groups, 1), point.split(outs), strict=True)
    y = torch.cat([convolved(part, w[:, :, None, None]) for part, w in parts], 1)
    found = excess(y, bounds(COMMON, y)["y"])
    assert found >= least
    assert (found <= 1) == (dtype == torch.float32)


def test_two_launches_have_the_same_bits():
    first, second = (run(COMMON, torch.float32, "native") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_memory_format_does_not_matter():
    tensors = tensors_of(COMMON, torch.float32)
    nhwc = {
        k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
        for k, v in tensors.items()
    }
    options = {"relu": True, "groups": 2}
    plain, last = (partial_pointwise_conv(**t, **options) for t in (tensors, nhwc))
    assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))
    assert plain[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("used", range(3))
def test_any_output_alone_has_the_right_gradient(used):
    leaves = {k: v.requires_grad_() for k, v in tensors_of(COMMON, torch.float32).items()}
    outputs = partial_pointwise_conv(**leaves, relu=True, groups=2)
    found = torch.autograd.grad(outputs[used].square().sum(), list(leaves.values()))
    y = outputs[0].detach()
    grads = [2 * out.detach() if i == used else None for i, out in enumerate(outputs)]
    grads[0] = torch.zeros_like(y) if grads[0] is None else grads[0]
    expected = partial_pointwise_conv_bounds(leaves, grads, y, relu=True, groups=2)
    for name, value in zip(leaves, found, strict=True):
        assert excess(value, expected[name]) <= 1, name
        assert excess(value * (1 + 2**-8), expected[name]) >= 10, name


@pytest.mark.parametrize("frozen", ["x", "scale", "partial_weight", "point_weight", "residual"])
def test_what_asks_for_no_gradient_gets_none_and_changes_no_other(frozen):
    def gradients(fixed):
        tensors = tensors_of(COMMON, torch.float32)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in fixed)
        y, sums, _ = partial_pointwise_conv(**tensors, relu=True, groups=2)
        (y.square().sum() + sums.sum()).backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    every, some = gradients(()), gradients((frozen,))
    assert some[frozen] is None
    assert all(torch.equal(some[k], every[k]) for k in every if k != frozen)


def test_opcheck():
    tensors = tensors_of(COMMON, torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.dfptkd.partial_pointwise_conv.default, (*leaves, True, 2))
    y = partial_pointwise_conv(**tensors, relu=True, groups=2)[0].detach()
    args = (y, None, None, *(t.detach() for t in leaves), y, True, 2, True, True, True)
    torch.library.opcheck(torch.ops.dfptkd.partial_pointwise_conv_backward.default, args)


def test_compiles_as_one_graph_into_one_operator():
    def both(compiled):
        tensors = tensors_of(COMMON, torch.float32)
        leaves = {k: v.requires_grad_() for k, v in tensors.items()}
        outputs = compiled(**leaves, relu=True, groups=2)
        sum(out.square().sum() for out in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves.values())]

    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph

    ours = both(torch.compile(partial_pointwise_conv, fullgraph=True, backend=look))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("partial_pointwise_conv" in target for target in targets) == 1
    torch.testing.assert_close(ours, both(partial_pointwise_conv), rtol=0, atol=0)
    inductor = both(torch.compile(partial_pointwise_conv, fullgraph=True))
    assert all(map(torch.equal, inductor, ours))


def test_a_second_derivative_is_refused():
    tensors = {k: v.requires_grad_() for k, v in tensors_of(COMMON, torch.float32).items()}
    y = partial_pointwise_conv(**tensors, relu=True, groups=2)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("touched", [0, 4])
def test_flops_are_those_of_eager(touched):
    case = Case(2, 16, (6, 5), touched, 3, 8, 1, True, "scale shift")

    def flops(name, fixed=()):
        tensors = {k: v for k, v in tensors_of(case, torch.float32).items() if v is not None}
        for key, tensor in tensors.items():
            tensor.requires_grad_(key not in fixed)
        with use_backend(name), FlopCounterMode(display=False) as counter:
            out = partial_pointwise_conv(
                **{"partial_weight": None, "residual": None, **tensors}, relu=True
            )
            out[0].sum().backward()
        return counter.get_total_flops()

    for fixed in ((), ("x", "scale", "shift"), ("partial_weight", "point_weight")):
        assert flops("native", fixed) == flops("reference", fixed) > 0


def test_it_serves_fp32_on_the_cpu_alone():
    x = torch.zeros(1, 2, 2, 2)
    assert which_backend("partial_pointwise_conv", x) == "native"
    assert which_backend("partial_pointwise_conv", x.bfloat16()) == "reference"
    with pytest.raises(RuntimeError, match="fp32"):
        partial_pointwise_conv(x, None, None, None, torch.ones(2, 2).double(), relu=False)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability):
    """The kernels are chosen when the library is loaded: each in a process of its own."""
    here = os.path.dirname(__file__)
    code = (
        f"import sys; sys.path[:0] = [{here!r}, {os.path.dirname(here)!r}]\n"
        "import test_fused_prompt_conv as t\n"
        "for case in t.covering_set()[::4]: t.test_errors_are_within_those_of_rounding(case)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# BatchNorm ----------------------------------------------------------------------------------------


EPSILON = 1e-5
SHAPES = [(2, 3, 1, 1), (5, 17, 7, 3), (3, 64, 9, 8)]


def batch_norm(x, weight, bias, relu, name, eps=EPSILON):
    """Training-mode BatchNorm and activation by the two ends; also the statistics."""
    with use_backend(name):
        sums, squared = x.sum((0, 2, 3)), x.square().sum((0, 2, 3))
        count = x.numel() // x.shape[1]
        scale, shift, mean, var = batch_norm_affine(sums, squared, weight, bias, count, eps)
        return affine_relu(x, scale, shift, relu=relu), mean, var


def batch_norm_case(shape):
    """x, weight, bias and the output's gradient, in fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, shape[1], shape[1], shape
    return [torch.randn(s, generator=generator) for s in shapes]


def batch_norm_results(case, relu, forward):
    """Output and gradients of forward(x, weight, bias), and what else it returns."""
    *inputs, grad = case
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, *statistics = forward(*leaves)
    gradients = torch.autograd.grad(y, leaves, grad)
    names = ("y", "x", "weight", "bias", "mean", "var")
    return dict(zip(names, (y.detach(), *gradients, *statistics), strict=False))


def torchs_batch_norm(x, weight, bias, relu):
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPSILON)
    return [y.relu() if relu else y]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_equals_torch(shape, relu):
    case = batch_norm_case(shape)
    expected = batch_norm_bounds(*case, relu=relu, eps=EPSILON)
    for name in ("reference", "native"):
        found = batch_norm_results(case, relu, lambda *t, name=name: batch_norm(*t, relu, name))
        assert found.keys() == expected.keys()
        for part, value in found.items():
            assert excess(value, expected[part]) <= 1, (name, part)
    wide = [t.double() for t in case]
    torchs = batch_norm_results(wide, relu, lambda *t: torchs_batch_norm(*t, relu))
    ours = batch_norm_results(wide, relu, lambda *t: batch_norm(*t, relu, "reference"))
    for part, value in torchs.items():
        assert excess(value, expected[part]) <= 1e-5, part
        torch.testing.assert_close(ours[part], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_bounds_of_batch_norm_tell_a_wrong_one_apart(shape):
    """Negative controls: another framework's epsilon, an unbiased variance, the next one's gain."""
    case = batch_norm_case(shape)
    expected = batch_norm_bounds(*case, relu=True, eps=EPSILON)
    pixels = case[0].numel() // shape[1]

    def unbiased(x, weight, bias):
        _, mean, var = batch_norm(x, weight, bias, False, "reference")
        var = var * pixels / (pixels - 1)
        scale = weight * (var + EPSILON).rsqrt()
        return affine_relu(x, scale, bias - mean * scale, relu=True), mean, var

    def rolled(x, weight, bias):
        return batch_norm(x, weight.roll(1), bias, True, "native")

    def epsilon(x, weight, bias):
        return batch_norm(x, weight, bias, True, "native", eps=1e-3)

    for slip, least in ((unbiased, 100), (rolled, 100), (epsilon, 10)):
        found = batch_norm_results(case, True, slip)
        excesses = {part: excess(found[part], expected[part]) for part in ("y", "x", "weight")}
        print(slip.__name__, {part: round(value, 1) for part, value in excesses.items()})
        assert all(value >= least for value in excesses.values()), excesses


def test_affine_relu_without_scale_or_shift():
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(affine_relu(x, None, None, relu=True), x.relu())
    shift = torch.randn(5)
    assert torch.equal(affine_relu(x, None, shift, relu=False), x + shift.view(1, -1, 1, 1))


def test_nan_passes_through():
    x = torch.full((1, 4, 2, 2), torch.nan)
    ones = torch.ones(4)
    assert affine_relu(x, ones, ones, relu=True).isnan().all()
    y, sums, _ = partial_pointwise_conv(x, ones, ones, None, torch.ones(3, 4), relu=True)
    assert y.isnan().all()
    assert sums.isnan().all()
