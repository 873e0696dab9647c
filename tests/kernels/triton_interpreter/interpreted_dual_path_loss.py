"""The Triton loss family, interpreted, against float64, within what rounding explains.

Run by ../test_triton_interpreter.py.
"""

import itertools
import math
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from error_bounds import RootMeanSquares, excess
from loss_bounds import loss_bounds

from dfptkd.kernels import DualPathWeights, distillation_loss, dual_path_loss, use_backend
from dfptkd.kernels import dual_path_loss_triton as triton_loss
from dfptkd.kernels.distillation_loss import distillation_loss_reference
from dfptkd.kernels.dual_path_loss import dual_path_loss_reference

# The interpreter computes where(mask, 0, inf - inf) on both sides, as a GPU does, but says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [
    (1, 2), (5, 2), (9, 2), (1, 10), (6, 10), (13, 10), (3, 100), (7, 100), (10, 100), (16, 100),
    (1, 1000), (3, 1000), (4, 1000), (6, 1000), (5, 1000), (1, 1001), (2, 1001), (6, 1001),
    (1, 5000), (2, 5000), (3, 5000), (5, 5000), (4, 4096), (2, 21841),
]  # fmt: skip
DTYPES, TAUS, SCALES = (BF16, FP32, FP16), (4.0, 1.0, 0.5, 20.0), (3.0, 1e4, 30.0)
SMOOTHINGS = (0.0, 0.1)
TARGETS = ("hard", "soft", "ignored", "soft fp16", "ignored NaN", "all ignored", "strided")
LOGITS = ("plain", "strided", "identical", "masked", "column-major", "expanded", "unaligned")
WEIGHTS = (
    (0.3, 0.7, 1.1, 0.9, 0.5, 1.3),
    (0.1, 0.9, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.7, 0.0, 0.9, 0.0, 1.3),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    dtype: torch.dtype
    tau: float
    scale: float
    smoothing: float
    target: str
    logits: str
    weights: tuple[float, ...]
    reverse_kl: bool

    def __str__(self):
        return "-".join(str(value) for value in astuple(self)).replace(" ", "_")


def covering_set():
    """Every size forward and reversed; the options in cycles of different lengths."""
    cases = []
    for i, ((rows, classes), reverse_kl) in enumerate(itertools.product(SIZES, (False, True))):
        k = i + i // 7  # so that no cycle stays in step with `reverse_kl`
        options = [
            levels[(k // step) % len(levels)]
            for levels, step in (
                (DTYPES, 1), (TAUS, 1), (SCALES, 2), (SMOOTHINGS, 2), (TARGETS, 1), (LOGITS, 1),
                (WEIGHTS, 5),
            )
        ]  # fmt: skip
        cases.append(Case(rows, classes, *options, reverse_kl))
    return cases


CASES = covering_set()
MEMBERS = {"dual_path_loss": 2, "distillation_loss": 1}  # learners of each


def make_logits(case, generator):
    """student, prompt, teacher [B, C]."""
    rows, classes = case.rows, case.classes
    logits = case.scale * torch.randn(3, rows, classes, generator=generator)
    logits = logits.clamp(-1e4, 1e4).to(case.dtype)
    if case.logits == "identical":
        return [logits[0].clone() for _ in range(3)]
    if case.logits == "masked":
        logits[:, :, 1] = -math.inf
    if case.logits == "strided":
        return [torch.cat([z, z.flip(1)], dim=1)[:, :classes] for z in logits]
    if case.logits == "column-major":
        return [z.t().contiguous().t() for z in logits]
    if case.logits == "expanded":
        return [logits[0], logits[1], logits[2, :1].expand(rows, classes)]
    if case.logits == "unaligned":
        return [torch.cat([z.flatten()[:1], z.flatten()])[1:].view(rows, classes) for z in logits]
    return list(logits.unbind())


def make_inputs(case):
    generator = torch.Generator().manual_seed(case.rows * case.classes)
    *logits, y = *make_logits(case, generator), make_labels(case, generator)
    if case.target.startswith("soft"):
        y = torch.randn(case.rows, case.classes, generator=generator).softmax(1)
        y[:, 1] = 0  # may be masked; rows then do not sum to 1
        y = y.half() if case.target == "soft fp16" else y
    if case.target == "ignored NaN":
        logits = [z.clone() for z in logits]
        for z in logits:
            z[::3] = math.nan
    return [*logits, y]


def make_labels(case, generator):
    y = torch.randint(0, case.classes, (case.rows,), generator=generator)
    y[y == 1] = 0
    if case.target.startswith("ignored"):
        y[::3] = -100
    if case.target == "all ignored":
        y[:] = -100
    return torch.stack([y, -y], dim=1)[:, 0] if case.target == "strided" else y


def options_of(case):
    """tau, label_smoothing, ignore_index, reverse_kl."""
    smoothing = 0.0 if case.logits == "masked" else case.smoothing  # else the loss is infinite
    return case.tau, smoothing, -100, case.reverse_kl


def launch(member, case, student, prompt, teacher, target):
    """Values, gradients and counts as the launcher gives them."""
    if member == "dual_path_loss":
        weights = torch.tensor(case.weights)
        total, terms, *hits, grad_student, grad_prompt = triton_loss.launch_dual_path_loss(
            student, prompt, teacher, target, weights, *options_of(case)
        )
        return [total, *terms, grad_student, grad_prompt], hits
    weights = torch.tensor(case.weights[:2])
    total, terms, hits, gradient = triton_loss.launch_distillation_loss(
        student, teacher, target, weights, *options_of(case)
    )
    return [total, *terms, gradient], [hits]


def reference(member, case, student, prompt, teacher, target):
    """The same from eager PyTorch in the dtype of the logits."""
    tau, *options = options_of(case)
    leaves = [student.detach().requires_grad_(), prompt.detach().requires_grad_()]
    if member == "dual_path_loss":
        weights = DualPathWeights(*case.weights)
        result = dual_path_loss_reference(*leaves, teacher, target, tau, weights, *options)
    else:
        leaves = leaves[:1]
        ce, kd = case.weights[:2]
        result = distillation_loss_reference(*leaves, teacher, target, tau, ce, kd, *options)
    gradients = torch.autograd.grad(result.total, leaves)
    return [result.total.detach(), *result.terms, *gradients], list(result[2:])


def double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def test_the_covering_set_covers():
    levels = (DTYPES, TAUS, SCALES, SMOOTHINGS, TARGETS, LOGITS, WEIGHTS, (False, True))
    columns = list(zip(*(astuple(case) for case in CASES), strict=True))[2:]
    for column, wanted in zip(columns, levels, strict=True):
        assert set(column) == set(wanted)
    for name, wanted in (("dtype", DTYPES), ("tau", TAUS), ("scale", SCALES)):
        pairs = {(case.reverse_kl, getattr(case, name)) for case in CASES}
        assert pairs == set(itertools.product((False, True), wanted))


def bounds(member, case, inputs):
    *logits, target = inputs
    named = dict(zip(("student", "prompt", "teacher"), logits, strict=True))
    weights = case.weights
    if member == "distillation_loss":
        named, weights = {k: z for k, z in named.items() if k != "prompt"}, weights[:2]
    tau, label_smoothing, ignore_index, reverse_kl = options_of(case)
    return loss_bounds(
        named, target, weights, tau=tau, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reverse_kl=reverse_kl, dtype=case.dtype,
        is_truncated=case.dtype == BF16,  # the interpreter cuts a number off where a GPU rounds it
    )  # fmt: skip


def check(member, case):
    inputs = make_inputs(case)
    before = [x.clone() for x in inputs]
    values, hits = launch(member, case, *inputs)
    for x, kept in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)
    exact, exact_hits = reference(member, case, *double(inputs))
    gradients = [None] * (len(values) - MEMBERS[member]) + [case.dtype] * MEMBERS[member]
    for value, truth, expected, dtype in zip(
        values, exact, bounds(member, case, inputs), gradients, strict=True
    ):
        assert value.dtype == (dtype or FP32)
        assert value.is_contiguous()
        assert excess(truth, expected) <= 1e-5  # the same function, by autograd
        assert excess(value, expected) <= 1
    assert [hit.item() for hit in hits] == [hit.item() for hit in exact_hits]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_M17_M18_dual_errors_are_within_those_of_rounding(case):
    check("dual_path_loss", case)


@pytest.mark.parametrize("case", [case for case in CASES if case.rows < 10][::2], ids=str)
def test_M17_M18_distillation_errors_are_within_those_of_rounding(case):
    check("distillation_loss", case)


def test_M17_M18_errors_are_at_most_twice_those_of_eager():
    """Their root mean square, in units of their bounds: either side is exact by luck at times."""
    means, member = RootMeanSquares(), "dual_path_loss"
    for case in CASES[::2]:
        case = replace(case, dtype=FP32, rows=min(case.rows, 6), classes=min(case.classes, 100))
        inputs = make_inputs(case)
        exact, _ = reference(member, case, *double(inputs))
        expected = bounds(member, case, inputs)
        for side in (launch, reference):
            values, _ = side(member, case, *inputs)
            for value, truth, bound in zip(values, exact, expected, strict=True):
                kind = "value" if truth.dim() == 0 else "gradient"
                means.add(f"{side.__name__} {kind}", value, truth, scale=bound.error)
    for kind in ("value", "gradient"):
        ours, eager = means[f"launch {kind}"], means[f"reference {kind}"]
        print(f"{kind}: {ours:.1e} {eager:.1e}")
        assert ours <= 2 * eager


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_tell_wrong_losses_apart(dtype):
    """Negative controls: a mean over one row too many, a class left out, another tau."""
    case = replace(PLAIN, rows=33, dtype=dtype, target="hard")
    *logits, target = make_inputs(case)
    expected = bounds("dual_path_loss", case, [*logits, target])
    values, _ = launch("dual_path_loss", case, *logits, target)
    without = [z.clone() for z in logits]
    for z in without:
        z[:, 0] = -30
    wrong = {
        "rows": [value * 33 / 34 for value in values],
        "class": launch("dual_path_loss", case, *without, target)[0],
        "tau": launch("dual_path_loss", replace(case, tau=4.5), *logits, target)[0],
    }
    for name, results in wrong.items():
        found = [excess(a, b) for a, b in zip(results, expected, strict=True)]
        print(name, [f"{value:.0f}" for value in found])
        if name == "tau":  # which cross-entropies have not
            del found[4], found[1]
        least = 100 if dtype == FP32 else 3  # gradients of eight or eleven bits
        assert min(found[:-2]) >= 100
        assert min(found[-2:]) >= least


PLAIN = Case(10, 10, FP32, 4.0, 3.0, 0.1, "ignored", "plain", WEIGHTS[0], False)


@pytest.mark.parametrize("target", ["ignored", "soft", "all ignored"])
def test_a_large_batch_is_counted_before_and_summed_in_parts(monkeypatch, target):
    monkeypatch.setattr(triton_loss, "SMALL_BATCH", 4)
    monkeypatch.setitem(triton_loss._COUNT_LAUNCH, "BLOCK", 4)
    monkeypatch.setitem(triton_loss._SUM_LAUNCH, "BLOCK", 4)
    for member in MEMBERS:
        check(member, replace(PLAIN, target=target))


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, classes=5000, rows=2, target="soft")])
def test_two_launches_are_bit_equal(case):
    inputs = make_inputs(case)
    first, second = (launch("dual_path_loss", case, *inputs)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_give_zeros():
    (total, *terms, grad_student, grad_prompt), hits = launch(
        "dual_path_loss", PLAIN, *(torch.zeros(0, 3) for _ in range(3)), torch.zeros(0).long()
    )
    assert [total, *terms, *hits] == [0] * 9
    assert grad_student.shape == grad_prompt.shape == (0, 3)


@pytest.mark.parametrize("tau", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("classes", [100, 5000])
def test_M17_kl_of_identical_logits_is_exactly_0(tau, classes):
    case = replace(PLAIN, rows=2, classes=classes, tau=tau, logits="identical", target="hard")
    (_, _, kl_st, kl_sp, _, kl_pt, kl_ps, *_), _ = launch(
        "dual_path_loss", case, *make_inputs(case)
    )
    assert [kl_st, kl_sp, kl_pt, kl_ps] == [0, 0, 0, 0]


def test_gradient_of_the_true_class_is_formed_before_it_is_rounded():
    student = torch.tensor([[8.0, 0.0, 0.0]], dtype=BF16)
    case = replace(PLAIN, tau=1.0, smoothing=0.0, weights=(1.0, 0, 0, 0, 0, 0))
    values, _ = launch("dual_path_loss", case, student, student, student, torch.tensor([0]))
    exact = student.double().softmax(1)[0, 0] - 1  # -0.00067; 0 or -0.0039 if rounded before
    assert abs(values[-2][0, 0].double() - exact) <= 2**-7 * abs(exact)  # interpreted: truncated


def test_ignored_rows_have_gradients_of_exactly_0():
    case = replace(PLAIN, target="ignored NaN")
    values, _ = launch("dual_path_loss", case, *make_inputs(case))
    for gradient in values[-2:]:
        assert (gradient[::3] == 0).all()
        assert (gradient[1::3] != 0).all()


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_M18_a_zero_weight_drops_a_broken_teacher_but_its_terms_show(reverse_kl):
    case = replace(PLAIN, weights=(1.0, 0.0, 1.0, 1.0, 0.0, 1.0), reverse_kl=reverse_kl)
    student, prompt, teacher, target = make_inputs(case)
    good, _ = launch("dual_path_loss", case, student, prompt, teacher, target)
    values, _ = launch("dual_path_loss", case, student, prompt, teacher * math.nan, target)
    assert [bool(x.isnan()) for x in values[1:7]] == [False, True, False] * 2
    assert all(torch.equal(values[i], good[i]) for i in (0, -1, -2))
    poisoned, _ = launch(
        "dual_path_loss", replace(case, weights=(1.0,) * 6), student, prompt, teacher * math.nan,
        target,
    )  # fmt: skip
    assert poisoned[0].isnan()


def test_a_row_of_nothing_but_minus_infinity_is_nan():
    case = replace(PLAIN, target="hard")
    student, prompt, teacher, target = make_inputs(case)
    values, _ = launch(
        "dual_path_loss", case, student, prompt, torch.full_like(teacher, -math.inf), target
    )
    assert [bool(x.isnan()) for x in values[1:7]] == [False, True, False, False, True, False]


@pytest.mark.parametrize("is_root", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_functions_take_the_kernel(dtype, is_root):
    case = replace(PLAIN, dtype=dtype)
    student, prompt, teacher, target = make_inputs(case)
    leaves = [student.requires_grad_(), prompt.requires_grad_()]
    options = {"tau": case.tau, "label_smoothing": 0.1, "is_root": is_root}
    with use_backend("triton"):
        dual = dual_path_loss(
            *leaves, teacher, target, weights=DualPathWeights(*case.weights), **options
        )
        single = distillation_loss(
            student, teacher, target, ce_weight=case.weights[0], kd_weight=case.weights[1],
            **options,
        )  # fmt: skip
    inputs = [x.detach() for x in (student, prompt, teacher, target)]
    expected, _ = launch("dual_path_loss", case, *inputs)
    assert torch.equal(dual.total, expected[0])
    for gradient, wanted in zip(
        torch.autograd.grad(dual.total, leaves), expected[-2:], strict=True
    ):
        assert torch.equal(gradient, wanted)
    expected, _ = launch("distillation_loss", case, *inputs)
    assert torch.equal(single.total, expected[0])
    assert torch.equal(torch.autograd.grad(single.total, student)[0], expected[-1])


def test_the_kernel_passes_through_compile():
    case = replace(PLAIN, rows=3)
    student, prompt, teacher, target = make_inputs(case)

    @torch.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    def step(student, prompt):
        return dual_path_loss(student, prompt, teacher, target, label_smoothing=0.1).total

    with use_backend("triton"):
        leaf = student.requires_grad_()
        compiled = torch.autograd.grad(step(leaf, prompt), leaf)[0]
    values, _ = launch(
        "dual_path_loss", replace(case, weights=(1.0,) * 6), student.detach(), prompt, teacher,
        target,
    )  # fmt: skip
    assert torch.equal(compiled, values[-2])
