"""The native loss family against float64, with eager fp32 as the yardstick (M17, M18)."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from dfptkd.kernels import (
    DualPathWeights,
    backend,
    distillation_loss,
    dual_path_loss,
    use_backend,
)

NO_NATIVE = backend.unavailable("native")
pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

EPS = torch.finfo(torch.float32).eps
ROWS, CLASSES = (1, 7, 64, 256, 1000), (2, 10, 100, 1000, 1001, 21841)
TAUS, SCALES, SMOOTHINGS = (4.0, 1.0, 0.5, 20.0), (3.0, 1e4, 30.0), (0.0, 0.1)
TARGETS = ("hard", "soft", "ignored", "ignored NaN")
LOGITS = ("plain", "strided", "identical", "masked", "column-major")
UPSTREAM = ("root", "scaled", "expanded")
WEIGHTS = (
    (0.3, 0.7, 1.1, 0.9, 0.5, 1.3),
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (0.1, 0.9, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.7, 0.0, 0.9, 0.0, 1.3),
    (0.3, 0.0, 1.1, 0.0, 0.5, 0.0),
)


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    tau: float
    scale: float
    smoothing: float
    target: str
    logits: str
    upstream: str
    weights: tuple[float, ...]
    reverse_kl: bool

    def __str__(self):
        return "-".join(str(value) for value in vars(self).values()).replace(" ", "_")


def covering_set():
    """Every size twice, forward and reversed; the options in cycles of different lengths."""
    cases = []
    sizes = [(b, c) for b in ROWS for c in CLASSES if b * c <= 1_100_000 or (b, c) == (64, 21841)]
    for i, ((rows, classes), reverse_kl) in enumerate(itertools.product(sizes, (False, True))):
        k = i + i // 7  # so that no cycle stays in step with `reverse_kl`
        options = [
            levels[(k // step) % len(levels)]
            for levels, step in (
                (TAUS, 1), (SCALES, 1), (SMOOTHINGS, 2), (TARGETS, 3),
                (LOGITS, 1), (UPSTREAM, 2), (WEIGHTS, 3),
            )
        ]  # fmt: skip
        cases.append(Case(rows, classes, *options, reverse_kl))
    return cases


CASES = covering_set()


def make_logits(case, generator):
    """student, prompt, teacher [B, C] fp32."""
    rows, classes = case.rows, case.classes
    logits = case.scale * torch.randn(3, rows, classes, generator=generator)
    if case.scale == 1e4:
        logits = logits.clamp(-1e4, 1e4)
    if case.logits == "identical":
        logits = logits[:1].expand(3, rows, classes).clone()
    if case.logits == "masked":
        logits[:, :, 1] = -torch.inf
    if case.logits == "strided":
        return [torch.cat([z, z.flip(1)], dim=1)[:, :classes] for z in logits]
    if case.logits == "column-major":
        return [z.t().contiguous().t() for z in logits]
    return list(logits.unbind())


def make_target(case, generator):
    if case.target == "soft":
        y = torch.randn(case.rows, case.classes, generator=generator).softmax(1)
        y[:, 1] = 0  # may be masked; rows then do not sum to 1
        return y
    y = torch.randint(0, case.classes, (case.rows,), generator=generator)
    y[y == 1] = 0
    if case.target.startswith("ignored"):
        y[::3] = -100
    return y


def make_inputs(case):
    generator = torch.Generator().manual_seed(case.rows * case.classes)
    *logits, target = *make_logits(case, generator), make_target(case, generator)
    if case.target == "ignored NaN":
        for z in logits:
            z[::3] = math.nan
    return [*logits, target]


def options_of(case):
    smoothing = 0.0 if case.logits == "masked" else case.smoothing  # else the loss is infinite
    return {"tau": case.tau, "label_smoothing": smoothing, "reverse_kl": case.reverse_kl}


def backward(total, leaves, upstream):
    if upstream == "scaled":
        total = -2.5 * total
    if upstream == "expanded":
        total = total.expand(3, 5)
    return torch.autograd.grad(total, leaves, torch.ones(()).expand(total.shape))


def run_dual(case, student, prompt, teacher, target):
    """Terms and total as single numbers, both gradients, both counts."""
    leaves = [student.detach().requires_grad_(), prompt.detach().requires_grad_()]
    weights = DualPathWeights(*case.weights)
    result = dual_path_loss(*leaves, teacher, target, weights=weights, **options_of(case))
    grads = backward(result.total, leaves, case.upstream)
    return [result.total, *result.terms, *grads], result[2:]


def run_single(case, student, _, teacher, target):
    leaf = student.detach().requires_grad_()
    ce, kd = case.weights[:2]
    result = distillation_loss(
        leaf, teacher, target, ce_weight=ce, kd_weight=kd, **options_of(case)
    )
    grads = backward(result.total, [leaf], case.upstream)
    return [result.total, *result.terms, *grads], result[2:]


def largest_errors(values, exact):
    return [
        (a.detach().double() - b.detach()).abs().max().item()
        for a, b in zip(values, exact, strict=True)
    ]


def tolerances(eager, exact):
    """Twice the error of eager fp32; where that is smaller by luck, a unit in the last place."""
    errors = largest_errors(eager, exact)
    return [
        2 * error + EPS * b.detach().abs().max().item()
        for error, b in zip(errors, exact, strict=True)
    ]


def run_all(run, case):
    """What native gives, eager fp32 and eager fp64, with equal inputs."""
    inputs = make_inputs(case)
    with use_backend("native"):
        native = run(case, *inputs)
    with use_backend("reference"):
        eager = run(case, *inputs)
        exact = run(case, *(x.double() if x.is_floating_point() else x for x in inputs))
    return native, eager, exact


# Errors against float64 ---------------------------------------------------------------------------


def test_the_covering_set_covers():
    assert len(CASES) >= 50
    levels = (
        ROWS, CLASSES, TAUS, SCALES, SMOOTHINGS, TARGETS, LOGITS, UPSTREAM, WEIGHTS, (False, True)
    )  # fmt: skip
    columns = list(zip(*(vars(case).values() for case in CASES), strict=True))
    for column, wanted in zip(columns, levels, strict=True):
        assert set(column) == set(wanted)
    for name, wanted in (("tau", TAUS), ("target", TARGETS), ("logits", LOGITS)):
        pairs = {(case.reverse_kl, getattr(case, name)) for case in CASES}
        assert pairs == set(itertools.product((False, True), wanted))


@pytest.mark.parametrize("run", [run_dual, run_single])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_M17_M18_error_is_at_most_twice_that_of_eager(case, run):
    (native, hits), (eager, _), (exact, exact_hits) = run_all(run, case)
    for error, tolerance, value in zip(
        largest_errors(native, exact), tolerances(eager, exact), exact, strict=True
    ):
        assert error <= tolerance or value.isnan().any()
    for values in (native, eager):
        for a, b in zip(values, exact, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
    assert hits == exact_hits
