"""dual_path_loss against the six terms and their gradients written out in fp64 (M17, M18)."""

import math

import numpy as np
import pytest
import torch
from error_bounds import Computed, excess
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_bounds import loss_bounds

from dfptkd.kernels import DualPathLoss, DualPathWeights, dual_path_loss

WEIGHTS = DualPathWeights(0.3, 0.7, 1.1, 0.9, 0.5, 1.3)
W = [0.3, 0.7, 1.1, 0.9, 0.5, 1.3]
SHAPES = [(b, c) for b in (0, 1, 7, 64) for c in (2, 10, 100, 1000, 1001)]


def make_logits(rows, classes, seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return [*logits.to(dtype).unbind(), labels]


def probabilities(rows, classes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(1)


def log_probabilities(z):
    z = z - z.max()
    return z - math.log(np.exp(z).sum())


def definition(student, prompt, teacher, target, tau=4.0, w=W, smoothing=0.0, ignore=-100,
               reverse=False):  # fmt: skip
    """Row by row in numpy fp64: six terms, their total, its gradients to s and p, hits."""
    s, p, t = (z.detach().double().numpy() for z in (student, prompt, teacher))
    y = target.numpy()
    rows, classes = s.shape
    kept = [b for b in range(rows) if y.ndim == 2 or y[b] != ignore]
    terms, hits = np.zeros(6), np.zeros(2, int)
    grads = {"s": np.zeros_like(s), "p": np.zeros_like(p)}

    for b in kept:
        label = y[b] if y.ndim == 2 else np.eye(classes)[y[b]]
        smoothed = (1 - smoothing) * label + smoothing / classes
        z = {"s": s[b], "p": p[b], "t": t[b]}
        for i, learner in ((0, "s"), (3, "p")):
            log_prob = log_probabilities(z[learner])
            terms[i] += -(smoothed * log_prob).sum() / len(kept)
            grads[learner][b] += w[i] * (np.exp(log_prob) - smoothed) / len(kept)
            hits[i // 3] += z[learner].argmax() == label.argmax()
        for i, supervisor, learner in ((1, "t", "s"), (2, "p", "s"), (4, "t", "p"), (5, "s", "p")):
            log_q, log_p = (log_probabilities(z[name] / tau) for name in (supervisor, learner))
            q, pr = np.exp(log_q), np.exp(log_p)
            if reverse:
                kl = (pr * (log_p - log_q)).sum()
                gradient = pr * (log_p - log_q - kl) / tau
            else:
                kl = (q * (log_q - log_p)).sum()
                gradient = (pr - q) / tau
            terms[i] += tau**2 * kl / len(kept)
            grads[learner][b] += w[i] * tau**2 * gradient / len(kept)
    return terms, float(np.dot(w, terms)), grads["s"], grads["p"], hits


def run(student, prompt, teacher, target, **options):
    """Result and both gradients, which are there under any weights."""
    student, prompt = student.clone().requires_grad_(), prompt.clone().requires_grad_()
    result = dual_path_loss(student, prompt, teacher, target, **options)
    result.total.backward()
    return result, student.grad, prompt.grad


def assert_equals_definition(inputs, *, dtype=torch.float64, **options):
    renamed = {"label_smoothing": "smoothing", "ignore_index": "ignore", "reverse_kl": "reverse"}
    terms, total, grad_s, grad_p, hits = definition(
        *inputs, **{renamed.get(k, k): v for k, v in options.items()}
    )
    *logits, target = inputs
    bounds = loss_bounds(
        dict(zip(("student", "prompt", "teacher"), logits, strict=True)), target, tuple(W),
        **{"tau": 4.0, **options, "unit": torch.finfo(dtype).eps / 2, "dtype": dtype},
    )  # fmt: skip
    result, *grads = run(*inputs, weights=WEIGHTS, **options)
    want = [
        torch.as_tensor(value, dtype=torch.float64) for value in (total, *terms, grad_s, grad_p)
    ]
    for got, true, bound in zip((result.total, *result.terms, *grads), want, bounds, strict=True):
        expected = Computed(true, bound.error, bound.unit)
        assert excess(bound.value, expected) <= (4 if dtype == torch.float64 else 1e-5)
        assert excess(got, expected) <= (4 if dtype == torch.float64 else 1)  # NumPy rounds, too
    assert [result.student_correct.item(), result.prompt_correct.item()] == hits.tolist()


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_M17_M18_values_and_gradients_equal_the_definition(rows, classes, tau):
    assert_equals_definition(make_logits(rows, classes), tau=tau)
    single = make_logits(rows, classes, dtype=torch.float32)
    assert_equals_definition(single, dtype=torch.float32, tau=tau)


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "soft", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_option_equals_the_definition(kind, smoothing, reverse_kl, dtype):
    inputs = make_logits(9, 11, dtype=dtype)
    options = {"tau": 2.0, "label_smoothing": smoothing, "reverse_kl": reverse_kl}
    if kind == "soft":
        inputs[3] = probabilities(9, 11)
    if kind == "ignored":
        inputs[3][[0, 4, 8]] = 255
        options["ignore_index"] = 255
    assert_equals_definition(inputs, dtype=dtype, **options)


def test_an_ignore_index_may_be_a_class():
    inputs = make_logits(20, 4)
    assert (inputs[3] == 2).any()
    assert_equals_definition(inputs, ignore_index=2)


def test_ignored_rows_leave_mean_counts_and_gradient():
    *logits, target = make_logits(8, 5)
    target[[1, 6]] = -100
    kept = target != -100
    result, grad_s, grad_p = run(*logits, target)
    alone, alone_s, alone_p = run(*(z[kept] for z in logits), target[kept])
    torch.testing.assert_close(result.terms, alone.terms, rtol=1e-14, atol=0)
    assert result.student_correct == alone.student_correct
    assert result.prompt_correct == alone.prompt_correct
    for grad, alone_grad in ((grad_s, alone_s), (grad_p, alone_p)):
        assert (grad[~kept] == 0).all()
        torch.testing.assert_close(grad[kept], alone_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_ignored_row_gives_no_gradient_even_where_it_is_not_finite(poison, reverse_kl):
    *logits, target = make_logits(4, 5)
    target[2] = -100
    clean = run(*logits, target, reverse_kl=reverse_kl)
    for z in logits:
        z[2, 1] = poison
    result, grad_s, grad_p = run(*logits, target, reverse_kl=reverse_kl)
    assert torch.equal(result.terms, clean[0].terms)
    assert torch.equal(grad_s, clean[1])
    assert torch.equal(grad_p, clean[2])


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_to_count_gives_zero(rows):
    *logits, _ = make_logits(rows, 5, dtype=torch.float32)
    result, grad_s, grad_p = run(*logits, torch.full((rows,), -100))
    assert result.total == 0
    assert torch.equal(result.terms, torch.zeros(6))
    assert result.student_correct == 0
    assert (grad_s == 0).all()
    assert (grad_p == 0).all()


# Weights ------------------------------------------------------------------------------------------


def only(*indices):
    return DualPathWeights(*(WEIGHT if i in indices else 0.0 for i, WEIGHT in enumerate(W)))


@pytest.mark.parametrize("dropped", range(6))
def test_M17_M18_zero_weight_removes_exactly_that_gradient(dropped):
    inputs = make_logits(7, 10)
    full, full_s, full_p = run(*inputs, weights=WEIGHTS)
    rest, rest_s, rest_p = run(*inputs, weights=only(*(set(range(6)) - {dropped})))
    _, alone_s, alone_p = run(*inputs, weights=only(dropped))
    assert torch.equal(rest.terms, full.terms), "a weight must not change what is logged"
    torch.testing.assert_close(full.total - rest.total, W[dropped] * full.terms[dropped])
    assert not torch.equal(rest_s if dropped < 3 else rest_p, full_s if dropped < 3 else full_p)
    torch.testing.assert_close(rest_s + alone_s, full_s, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rest_p + alone_p, full_p, rtol=1e-12, atol=1e-15)
    untouched = alone_p if dropped < 3 else alone_s
    assert (untouched == 0).all(), "a student term reached the prompt path, or the other way round"


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_M17_zero_weight_removes_a_prompt_path_that_is_not_finite(reverse_kl):
    student, prompt, teacher, target = make_logits(4, 5)
    options = {"weights": DualPathWeights(0.1, 0.9, 0.0, 0.0, 0.0, 0.0), "reverse_kl": reverse_kl}
    _, sound, _ = run(student, prompt, teacher, target, **options)
    prompt[1, 2] = math.nan
    result, grad, _ = run(student, prompt, teacher, target, **options)
    assert result.terms[2].isnan()
    assert result.total.isfinite()
    assert torch.equal(grad, sound)


def test_all_weights_zero_is_a_loss_of_zero():
    result, grad_s, grad_p = run(*make_logits(3, 4), weights=DualPathWeights(*[0.0] * 6))
    assert result.total == 0
    assert (result.terms > 0).all()
    assert (grad_s == 0).all()
    assert (grad_p == 0).all()


@pytest.mark.parametrize("zeros", [(), (2,), (1, 5)])
def test_weights_as_tensor_equal_numbers(zeros):
    inputs = make_logits(7, 10, dtype=torch.float32)
    numbers = [0.0 if i in zeros else w for i, w in enumerate(W)]
    weights = torch.tensor(numbers)
    by_number = run(*inputs, weights=DualPathWeights(*numbers))
    by_tensor = run(*inputs, weights=weights)
    torch.testing.assert_close(by_tensor, by_number, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=6, max_size=6), st.floats(0.25, 20), st.booleans())
def test_total_is_the_weighted_sum_of_the_terms(numbers, tau, reverse_kl):
    inputs = make_logits(5, 6)
    result = dual_path_loss(
        *inputs, tau=tau, weights=DualPathWeights(*numbers), reverse_kl=reverse_kl
    )
    expected = sum(w * term for w, term in zip(numbers, result.terms.tolist(), strict=True))
    assert result.total.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert not result.terms.requires_grad


# Numerics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_logits_of_ten_thousand_stay_finite(dtype, reverse_kl):
    *logits, target = make_logits(6, 8)
    logits = [(1e4 * z.sign()).to(dtype) for z in logits]
    result, grad_s, grad_p = run(*logits, target, tau=0.5, reverse_kl=reverse_kl)
    assert all(x.isfinite().all() for x in (result.total, result.terms, grad_s, grad_p))


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_classes_masked_in_all_three_are_as_if_absent(kind, reverse_kl):
    *logits, target = make_logits(6, 8)
    present = torch.tensor([0, 2, 3, 7])
    if kind == "soft":
        few = probabilities(6, 4)
        target = torch.zeros(6, 8, dtype=torch.float64).index_copy(1, present, few)
    else:
        few = target % 4
        target = present[few]
    masked = [torch.full_like(z, -torch.inf).index_copy(1, present, z[:, present]) for z in logits]
    result, *grads = run(*masked, target, reverse_kl=reverse_kl)
    expected, *few_grads = run(*(z[:, present] for z in logits), few, reverse_kl=reverse_kl)
    torch.testing.assert_close(result.terms, expected.terms, rtol=1e-12, atol=1e-14)
    for grad, few_grad in zip(grads, few_grads, strict=True):
        torch.testing.assert_close(grad[:, present], few_grad, rtol=1e-12, atol=1e-14)
        assert (grad[:, [1, 4, 5, 6]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_identical_paths_have_divergence_exactly_zero(dtype, reverse_kl):
    z, _, _, target = make_logits(7, 100, dtype=dtype)
    terms = dual_path_loss(z, z.clone(), z.clone(), target, reverse_kl=reverse_kl).terms
    assert terms[[1, 2, 4, 5]].tolist() == [0.0] * 4
    assert (terms[[0, 3]] > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=3, max_size=3), st.sampled_from([0.5, 1.0, 4.0]))
def test_adding_a_constant_to_a_row_changes_nothing(shifts, tau):
    *logits, target = make_logits(4, 6)
    shifted = [z + shift for z, shift in zip(logits, shifts, strict=True)]
    torch.testing.assert_close(
        run(*shifted, target, tau=tau), run(*logits, target, tau=tau), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("tau", [0.5, 4.0, 20.0])
def test_divergence_scales_with_tau_squared(tau):
    *logits, target = make_logits(5, 9)
    at_one = dual_path_loss(*logits, target, tau=1.0).terms
    scaled = dual_path_loss(*(tau * z for z in logits), target, tau=tau).terms
    kl = [1, 2, 4, 5]
    torch.testing.assert_close(scaled[kl], tau**2 * at_one[kl], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    inputs = make_logits(7, 100, dtype=dtype)
    result, grad_s, grad_p = run(*inputs, weights=WEIGHTS)
    expected = run(*(z.float() for z in inputs[:3]), inputs[3], weights=WEIGHTS)
    assert result.total.dtype == result.terms.dtype == torch.float32
    assert torch.equal(result.terms, expected[0].terms)
    assert torch.equal(result.total, expected[0].total)
    assert torch.equal(grad_s, expected[1].to(dtype))
    assert torch.equal(grad_p, expected[2].to(dtype))


def test_types_and_shapes_of_the_result():
    for dtype, out in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
        result = dual_path_loss(*make_logits(3, 4, dtype=dtype))
        assert isinstance(result, DualPathLoss)
        assert (result.total.dtype, result.terms.dtype) == (out, out)
        assert (result.total.shape, result.terms.shape) == ((), (6,))
        for count in (result.student_correct, result.prompt_correct):
            assert (count.dtype, count.shape) == (torch.int64, ())


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(soft, reverse_kl):
    """Numeric derivatives see through a detach: each learner alone, its own terms alone."""
    student, prompt, teacher, target = make_logits(3, 4, scale=1.0)
    target = probabilities(3, 4) if soft else target

    def student_loss(z):
        options = {"weights": only(0, 1, 2), "label_smoothing": 0.1, "reverse_kl": reverse_kl}
        return dual_path_loss(z, prompt, teacher, target, **options).total

    def prompt_loss(z):
        options = {"weights": only(3, 4, 5), "label_smoothing": 0.1, "reverse_kl": reverse_kl}
        return dual_path_loss(student, z, teacher, target, **options).total

    assert torch.autograd.gradcheck(student_loss, student.requires_grad_())
    student = student.detach()
    assert torch.autograd.gradcheck(prompt_loss, prompt.requires_grad_())


# What a call leaves alone -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "target", "weights"])
def test_a_constant_that_asks_for_a_gradient_is_refused(name):
    student, prompt, teacher, _ = make_logits(3, 4)
    learners = student.requires_grad_(), prompt.requires_grad_()
    constants = {"teacher": teacher, "target": probabilities(3, 4), "weights": torch.tensor(W)}
    constants[name].requires_grad_()
    message = f"^{name}: requires grad, .* in the order student, prompt, teacher, target"
    with pytest.raises(ValueError, match=message):
        dual_path_loss(*learners, **constants)
    with torch.no_grad():  # an evaluation asks for none
        dual_path_loss(*learners, **constants)


@pytest.mark.parametrize("compiles", [False, True])
def test_teacher_and_prompt_in_the_order_of_the_dual_path_output_are_refused(compiles):
    """`loss(student, *dual(images), target)` would train the student alone, without a word."""
    student, prompt, teacher, target = make_logits(3, 4)
    loss = torch.compile(dual_path_loss, backend="eager") if compiles else dual_path_loss
    with pytest.raises(ValueError, match=r"^teacher: requires grad"):
        loss(student.requires_grad_(), teacher, prompt.requires_grad_(), target)


def test_M11_inputs_are_not_written():
    student, prompt, teacher, target = make_logits(3, 4)
    weights = torch.tensor(W)
    inputs = (student, prompt, teacher, target, weights)
    before = [(x._version, x.clone()) for x in inputs]
    leaves = student.requires_grad_(), prompt.requires_grad_()
    dual_path_loss(*leaves, teacher, target, weights=weights).total.backward()
    for x, (version, value) in zip(inputs, before, strict=True):
        assert x._version == version
        assert torch.equal(x, value)


def test_non_contiguous_logits():
    inputs = make_logits(7, 10)
    strided = [z.t().contiguous().t() for z in inputs[:3]]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(run(*strided, inputs[3]), run(*inputs))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_as_one_graph(as_tensor):
    inputs = make_logits(7, 10, dtype=torch.float32)
    weights = torch.tensor(W) if as_tensor else WEIGHTS

    def loss(student, prompt, teacher, target):
        return dual_path_loss(student, prompt, teacher, target, weights=weights, tau=2.0)

    student, prompt = (z.clone().requires_grad_() for z in inputs[:2])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = compiled(student, prompt, *inputs[2:])
    result.total.backward()
    expected = run(*inputs, weights=weights, tau=2.0)
    torch.testing.assert_close((result, student.grad, prompt.grad), expected)


# Errors -------------------------------------------------------------------------------------------

Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
META = torch.zeros(3, 4, device="meta")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.zeros(3), Z, Z, Y), "student"),
        ((torch.zeros(3, 4, 1), Z, Z, Y), "student"),
        ((torch.zeros(3, 4, dtype=torch.int64), Z, Z, Y), "student"),
        ((torch.zeros(3, 0), Z, Z, Y), "student"),
        ((Z, torch.zeros(3, 5), Z, Y), "prompt"),
        ((Z, Z, torch.zeros(2, 4), Y), "teacher"),
        ((Z, Z.double(), Z, Y), "prompt"),
        ((Z, Z, Z.bfloat16(), Y), "teacher"),
        ((Z, Z, META, Y), "teacher"),
        ((Z, Z, Z, Y.to("meta")), "target"),
        ((Z, Z, Z, Y[:2]), "target"),
        ((Z, Z, Z, Y[:, None]), "target"),
        ((Z, Z, Z, Y.int()), "target"),
        ((Z, Z, Z, Y.bool()), "target"),
        ((Z, Z, Z, torch.zeros(3)), "target"),
    ],
)
def test_inputs_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected .* got "):
        dual_path_loss(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.0},
        {"tau": -1.0},
        {"tau": math.nan},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"weights": torch.ones(5)},
        {"weights": torch.ones(1, 6)},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected .* got "):
        dual_path_loss(Z, Z, Z, Y, **options)


@pytest.mark.parametrize("label", [4, -1, 1000])
def test_a_label_out_of_range_raises_on_the_cpu(label):
    with pytest.raises(IndexError):
        dual_path_loss(Z, Z, Z, torch.tensor([0, label, 1]))
