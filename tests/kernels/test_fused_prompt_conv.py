"""The native prompt-path kernels against float64, with eager fp32 as the yardstick (M9, M10)."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dfptkd.kernels import backend, partial_pointwise_conv, use_backend, which_backend
from dfptkd.kernels.batch_norm import affine_relu, batch_norm_affine

NO_NATIVE = backend.unavailable("native")
pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

EPS = torch.finfo(torch.float32).eps
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


def magnitude(case, name, want, exact):
    """What rounding is relative to: the largest value; of a sum, of what is summed up."""
    if name in ("sums", "squared_sums"):
        return (exact["y"].abs() ** (2 if "squared" in name else 1)).sum((0, 2, 3)).max().item()
    return want.abs().max().item()


@pytest.mark.parametrize("case", covering_set(), ids=str)
def test_errors_are_at_most_twice_those_of_eager(case):
    exact = run(case, torch.float64, "reference")
    eager = run(case, torch.float32, "reference")
    ours = run(case, torch.float32, "native")
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        assert ours[name].shape == want.shape
        error, yardstick = (
            (side[name].double() - want).abs().max().item() for side in (ours, eager)
        )
        # Eager is now and then exact by luck, so a few units in the last place are always granted.
        assert error <= max(2 * yardstick, 8 * EPS * magnitude(case, name, want, exact)), name


COMMON = Case(3, 16, (9, 7), 4, 5, 12, 2, True, "scale shift residual")


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
    def gradient(dtype, name):
        tensors = tensors_of(COMMON)
        tensors = {k: v.float().to(dtype).requires_grad_() for k, v in tensors.items()}
        with use_backend(name):
            out = partial_pointwise_conv(**tensors, relu=True, groups=2)[used]
        return torch.autograd.grad(out.square().sum(), list(tensors.values()))

    for ours, want in zip(
        gradient(torch.float32, "native"), gradient(torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(
            ours.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item()
        )


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
    torch.testing.assert_close(inductor, ours)


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
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_fused_prompt_conv as t\n"
        "for case in t.covering_set()[::4]: t.test_errors_are_at_most_twice_those_of_eager(case)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# BatchNorm ----------------------------------------------------------------------------------------


def batch_norm(x, weight, bias, relu, name):
    """Training-mode BatchNorm and activation by the two ends; also the statistics."""
    with use_backend(name):
        sums, squared = x.sum((0, 2, 3)), x.square().sum((0, 2, 3))
        count = x.numel() // x.shape[1]
        scale, shift, mean, var = batch_norm_affine(sums, squared, weight, bias, count, 1e-5)
        return affine_relu(x, scale, shift, relu=relu), mean, var


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (5, 17, 7, 3), (3, 64, 9, 8)], ids=str)
def test_batch_norm_equals_torch(shape, relu):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradients(forward, dtype):
        leaves = [t.float().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = forward(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.float().to(dtype))]

    def torch_own(x, weight, bias):
        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
        return y.relu() if relu else y

    want = gradients(torch_own, torch.float64)
    for name, dtype, rounding in (
        ("reference", torch.float64, 1e-11),
        ("reference", torch.float32, 2e-5),
        ("native", torch.float32, 2e-5),
    ):
        found = gradients(lambda *t, name=name: batch_norm(*t, relu, name)[0], dtype)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=rounding * max(1, b.abs().max().item())
            )
    mean, var = (
        v.double() for v in batch_norm(x.float(), weight.float(), bias.float(), relu, "native")[1:]
    )
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, x.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-6)


def test_affine_relu_without_scale_or_shift():
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(affine_relu(x, None, None, relu=True), x.relu())
    shift = torch.randn(5)
    torch.testing.assert_close(affine_relu(x, None, shift, relu=False), x + shift.view(1, -1, 1, 1))


def test_nan_passes_through():
    x = torch.full((1, 4, 2, 2), torch.nan)
    ones = torch.ones(4)
    assert affine_relu(x, ones, ones, relu=True).isnan().all()
    y, sums, _ = partial_pointwise_conv(x, ones, ones, None, torch.ones(3, 4), relu=True)
    assert y.isnan().all()
    assert sums.isnan().all()
