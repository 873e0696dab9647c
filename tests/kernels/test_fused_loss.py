"""The native loss family against float64, within what rounding explains (M17, M18)."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from error_bounds import RootMeanSquares, excess
from loss_bounds import loss_bounds

from dfptkd.kernels import (
    DualPathWeights,
    backend,
    distillation_loss,
    dual_path_loss,
    use_backend,
    which_backend,
)

NO_NATIVE = backend.unavailable("native")
pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

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
BASIC = Case(33, 100, 2.0, 3.0, 0.1, "hard", "plain", "root", WEIGHTS[0], False)


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


def make_inputs(case, seed=0):
    generator = torch.Generator().manual_seed(case.rows * case.classes + seed)
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


FACTORS = {"root": 1.0, "scaled": -2.5, "expanded": 15.0}


def bounds(run, case, inputs):
    """What each value of `run` may be."""
    *logits, target = inputs
    named = dict(zip(("student", "prompt", "teacher"), logits, strict=True))
    weights = case.weights
    if run is run_single:
        named, weights = {k: z for k, z in named.items() if k != "prompt"}, weights[:2]
    return loss_bounds(
        named, target, weights, dtype=logits[0].dtype, factor=FACTORS[case.upstream],
        **options_of(case),
    )  # fmt: skip


def run_all(run, case, seed=0):
    """What native gives, eager fp32 and eager fp64, with equal inputs."""
    inputs = make_inputs(case, seed)
    with use_backend("native"):
        native = run(case, *inputs)
    with use_backend("reference"):
        eager = run(case, *inputs)
        exact = run(case, *(x.double() if x.is_floating_point() else x for x in inputs))
    return native, eager, exact


BOTH = [run_dual, run_single]


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


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_M17_M18_errors_are_within_those_of_rounding(case, run):
    (native, hits), (eager, _), (exact, exact_hits) = run_all(run, case)
    assert all(value.isfinite().all() for value in exact)
    for ours, theirs, true, expected in zip(
        native, eager, exact, bounds(run, case, make_inputs(case)), strict=True
    ):
        assert excess(true, expected) <= 1e-5  # the same function, by autograd
        assert excess(ours, expected) <= 1
        assert excess(theirs, expected) <= 1
    assert hits == exact_hits


@pytest.mark.parametrize("run", BOTH)
def test_M17_M18_errors_are_at_most_twice_those_of_eager(run):
    """Their root mean square over many draws: either side is now and then exact by luck.

    In units of their bounds: some values are next to 0 by cancellation.
    """
    means = RootMeanSquares()
    draws = [(case, seed) for case in CASES for seed in range(2) if case.rows * case.classes < 2e4]
    for case, seed in draws:
        native, eager, exact = (values for values, _ in run_all(run, case, seed))
        expected = bounds(run, case, make_inputs(case, seed))
        for ours, theirs, true, bound in zip(native, eager, exact, expected, strict=True):
            kind = "value" if true.dim() == 0 else "gradient"
            means.add(f"native {kind}", ours, true, scale=bound.error)
            means.add(f"eager {kind}", theirs, true, scale=bound.error)
    for kind in ("value", "gradient"):
        ours, theirs = means[f"native {kind}"], means[f"eager {kind}"]
        print(f"{kind}: {ours:.1e} {theirs:.1e}")
        assert ours <= 2 * theirs


def test_the_bounds_tell_wrong_losses_apart():
    """Negative controls: a mean over one row too many, another tau, a class left out, results in
    bf16, a gradient from logits in bf16, an entry of a gradient that is 0."""
    case = next(c for c in CASES if (c.rows, c.logits, c.scale) == (64, "plain", 3.0))
    inputs = make_inputs(case)
    expected = bounds(run_dual, case, inputs)
    (native, _), _, _ = run_all(run_dual, case)
    *logits, target = inputs

    def excesses(values):
        return [excess(found, bound) for found, bound in zip(values, expected, strict=True)]

    assert max(excesses(native)) <= 1
    without = [z.clone() for z in logits]
    for z in without:
        z[:, 0] = -30
    wrong = {
        "rows": [value * 64 / 65 for value in native],
        "tau": run_dual(Case(**{**vars(case), "tau": case.tau * 1.01}), *inputs)[0],
        "class": run_dual(case, *without, target)[0],
        "bf16": [value.bfloat16() for value in native],
    }
    for name, values in wrong.items():
        found = excesses(values)
        print(name, [f"{value:.0f}" for value in found])
        if name == "tau":  # which cross-entropies have not
            del found[4], found[1]
        if name == "bf16":  # one number of eight bits may be right by luck
            assert sorted(found)[len(found) // 2] >= 10
            assert min(found[-2:]) >= 100
        else:
            assert min(found) >= 100, name
    from_bf16, _ = run_dual(case, *(z.bfloat16().float() for z in logits), target)
    assert min(excesses(from_bf16)[-2:]) >= 100
    for gradient, bound in zip(native[-2:], expected[-2:], strict=True):
        perturbed = gradient.clone()
        perturbed.view(-1)[gradient.abs().argmax()] = 0
        assert excess(perturbed, bound) >= 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    student, prompt, teacher, target = make_inputs(BASIC)
    inputs = [*(z.to(dtype) for z in (student, prompt, teacher)), target]
    with use_backend("native"):
        native, _ = run_dual(BASIC, *inputs)
    assert [x.dtype for x in native[-2:]] == [dtype, dtype]
    for found, expected in zip(native, bounds(run_dual, BASIC, inputs), strict=True):
        assert excess(found, expected) <= 1


@pytest.mark.parametrize("case", [c for c in CASES if c.logits == "identical"], ids=str)
def test_identical_paths_have_divergence_exactly_zero(case):
    with use_backend("native"):
        dual, _ = run_dual(case, *make_inputs(case))
        single, _ = run_single(case, *make_inputs(case))
    assert [dual[1 + i].item() for i in (1, 2, 4, 5)] == [0.0] * 4
    assert single[2] == 0


def test_hits_of_ties_and_of_rows_that_are_not_finite_are_those_of_argmax():
    rows = torch.tensor(
        [[1, 1, 0], [0, 1, 1], [1, math.nan, 1], [math.nan] * 3, [-math.inf] * 3, [math.inf, 1, 2]]
    )
    for label in range(3):
        target = torch.full((6,), label)
        with use_backend("native"):
            _, hits = run_dual(BASIC, rows, rows.flip(1), rows, target)
        with use_backend("reference"):
            _, expected = run_dual(BASIC, rows, rows.flip(1), rows, target)
        assert hits == expected


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_M17_zero_weight_as_a_tensor_keeps_a_term_that_is_not_finite_out(reverse_kl):
    student, prompt, teacher, target = make_inputs(BASIC)
    weights = torch.tensor([0.1, 0.9, 0, 0, 0, 0])
    leaf = student.requires_grad_()
    options = {"weights": weights, "reverse_kl": reverse_kl}
    (sound,) = torch.autograd.grad(
        dual_path_loss(leaf, prompt, teacher, target, **options).total, leaf
    )
    prompt = torch.full_like(prompt, math.nan).requires_grad_()
    result = dual_path_loss(leaf, prompt, teacher, target, **options)
    grads = torch.autograd.grad(result.total, (leaf, prompt))
    assert result.terms[2].isnan()
    assert result.total.isfinite()
    assert torch.equal(grads[0], sound)
    assert (grads[1] == 0).all()


# The operators ------------------------------------------------------------------------------------


def operator_inputs(name, *, soft=False, reverse_kl=False, requires_grad=False):
    case = Case(9, 11, 2.0, 3.0, 0.1, "soft" if soft else "hard", "plain", "root", (), reverse_kl)
    student, prompt, teacher, target = make_inputs(case)
    learners = [student, prompt] if name == "dual_path_loss" else [student]
    weights = torch.rand(6 if name == "dual_path_loss" else 2)
    learners = [z.requires_grad_(requires_grad) for z in learners]
    return *learners, teacher, target, weights, 2.0, 0.1, -100, reverse_kl


@pytest.mark.parametrize("name", ["dual_path_loss", "distillation_loss"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_opcheck(name, soft, reverse_kl):
    options = {"soft": soft, "reverse_kl": reverse_kl}
    native = getattr(torch.ops.dfptkd, f"{name}_native").default
    torch.library.opcheck(native, operator_inputs(name, **options))
    fused = getattr(torch.ops.dfptkd, f"{name}_fused").default
    inputs = operator_inputs(name, **options, requires_grad=True)
    for is_root in (False, True):
        torch.library.opcheck(fused, (*inputs, is_root))


@pytest.mark.parametrize("name", ["dual_path_loss", "distillation_loss"])
def test_the_operator_is_differentiable_by_itself_as_in_a_public_call(name):
    fused = getattr(torch.ops.dfptkd, f"{name}_fused")
    inputs = operator_inputs(name, requires_grad=True)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    total, *rest = fused(*inputs, False)
    for got, unscaled in zip(
        torch.autograd.grad(-3 * total, leaves), rest[-len(leaves) :], strict=True
    ):
        assert torch.equal(got, -3 * unscaled)


@pytest.mark.parametrize("run", BOTH)
def test_the_choice_is_automatic_and_two_calls_are_bit_equal_on_any_number_of_threads(run):
    case = next(c for c in CASES if (c.rows, c.classes) == (256, 1001))
    inputs = make_inputs(case)
    assert which_backend("dual_path_loss", inputs[0]) == "native"
    assert which_backend("distillation_loss", inputs[0]) == "native"
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, *inputs)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_M11_inputs_are_not_written_and_gradients_are_fresh(run, case):
    inputs = make_inputs(case)
    before = [(x._version, x.clone()) for x in inputs]
    values, _ = run(case, *inputs)
    for x, (version, value) in zip(inputs, before, strict=True):
        assert x._version == version
        torch.testing.assert_close(x, value, rtol=0, atol=0, equal_nan=True)
    for value in values:
        assert value.untyped_storage().data_ptr() not in {
            x.untyped_storage().data_ptr() for x in inputs
        }


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("upstream", ["root", "scaled"])
def test_compiles_as_one_graph_that_holds_the_operator(run, compiler, upstream):
    torch._dynamo.reset()
    case = Case(**{**vars(BASIC), "upstream": upstream})
    *logits, target = make_inputs(case)
    expected, _ = run(case, *logits, target)
    leaves = [z.requires_grad_() for z in (logits[:2] if run is run_dual else logits[:1])]
    ce, kd = case.weights[:2]

    def loss(student, prompt, teacher, target):
        if run is run_dual:
            weights = DualPathWeights(*case.weights)
            inputs = (student, prompt, teacher, target)
            return dual_path_loss(*inputs, weights=weights, **options_of(case))
        return distillation_loss(
            student, teacher, target, ce_weight=ce, kd_weight=kd, **options_of(case)
        )

    result = torch.compile(loss, fullgraph=True, backend=compiler)(*logits, target)
    got = [result.total, *result.terms, *backward(result.total, leaves, upstream)]
    assert all(map(torch.equal, got, expected))


def test_compiled_code_holds_the_operator():
    torch._dynamo.reset()
    targets = []

    def compiler(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(dual_path_loss, fullgraph=True, backend=compiler)(*make_inputs(BASIC))
    assert "dfptkd.dual_path_loss_fused.default" in targets


@pytest.mark.parametrize("loss", [dual_path_loss, distillation_loss])
def test_is_root_spares_the_multiplication(loss):
    inputs = make_inputs(BASIC)
    if loss is distillation_loss:
        del inputs[1]
    leaf = inputs[0].requires_grad_()
    (plain,) = torch.autograd.grad(loss(*inputs).total, leaf)
    (root,) = torch.autograd.grad(loss(*inputs, is_root=True).total, leaf)
    assert torch.equal(plain, root)
    (unscaled,) = torch.autograd.grad(7 * loss(*inputs, is_root=True).total, leaf)
    assert torch.equal(unscaled, plain), "the promise was broken, so there was a multiplication"


def test_backward_twice_over_one_graph_gives_the_same():
    student, prompt, teacher, target = make_inputs(BASIC)
    leaves = [student.requires_grad_(), prompt.requires_grad_()]
    total = dual_path_loss(*leaves, teacher, target).total
    first = [g.clone() for g in torch.autograd.grad(total, leaves, retain_graph=True)]
    for grad in torch.autograd.grad(total, leaves, retain_graph=True):
        grad.clone().zero_()
    total.backward(retain_graph=True)
    student.grad.zero_()  # must not reach what the graph has saved
    assert all(map(torch.equal, first, torch.autograd.grad(total, leaves)))


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 100, -(2**62)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_label_out_of_range_is_an_index_error_that_names_it(label, compiled):
    torch._dynamo.reset()
    student, prompt, teacher, target = make_inputs(BASIC)
    target[5] = label
    message = rf"target: expected labels in 0\.\.99, got {label} in row 5"
    loss = [dual_path_loss, distillation_loss]
    if compiled:
        loss = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in loss]
    with pytest.raises(IndexError, match=message):
        loss[0](student, prompt, teacher, target)
    with pytest.raises(IndexError, match=message):
        loss[1](student, teacher, target)
    result = dual_path_loss(student, prompt, teacher, target, ignore_index=label)
    assert result.total.isfinite()


def test_a_second_derivative_is_refused():
    student, prompt, teacher, target = make_inputs(BASIC)
    student.requires_grad_()
    total = dual_path_loss(student, prompt, teacher, target).total
    (grad,) = torch.autograd.grad(total**2, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_operator_refuses_what_no_fused_backend_takes():
    inputs = [x.double() if i < 3 else x for i, x in enumerate(operator_inputs("dual_path_loss"))]
    with pytest.raises(RuntimeError, match=r"has no fused backend for torch\.float64"):
        torch.ops.dfptkd.dual_path_loss_fused(*inputs, False)
    assert which_backend("dual_path_loss", inputs[0]) == "reference"


def test_a_direct_call_out_of_bounds_is_refused():
    inputs = list(operator_inputs("dual_path_loss"))
    for index, wrong in (
        (1, torch.zeros(9, 10)),
        (3, torch.zeros(8, dtype=torch.int64)),
        (4, torch.ones(5)),
    ):
        broken = [*inputs[:index], wrong, *inputs[index + 1 :]]
        with pytest.raises(RuntimeError, match=r"expected|one shape"):
            torch.ops.dfptkd.dual_path_loss_native(*broken)


def test_weights_on_another_device_are_named():
    inputs = make_inputs(BASIC)
    with pytest.raises(ValueError, match=r"^weights: expected .* on cpu, got \[6\] on meta"):
        dual_path_loss(*inputs, weights=torch.ones(6, device="meta"))
