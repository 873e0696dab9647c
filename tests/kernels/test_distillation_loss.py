"""distillation_loss against its definition in fp64 and against dual_path_loss (M15, T2)."""

import math

import numpy as np
import pytest
import torch

from dfptkd.kernels import DualPathWeights, distillation_loss, dual_path_loss


def make_logits(rows, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return [*logits.to(dtype).unbind(), labels]


def log_probabilities(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def definition(student, teacher, target, tau, ce_weight, kd_weight, smoothing=0.0, reverse=False):
    """Terms, and the gradient of the total towards the student, for labels that all count."""
    s, t = student.double().numpy(), teacher.double().numpy()
    rows, classes = s.shape
    y = target.numpy() if target.is_floating_point() else np.eye(classes)[target.numpy()]
    y = (1 - smoothing) * y + smoothing / classes
    log_s, log_q, log_p = (log_probabilities(z) for z in (s, t / tau, s / tau))
    q, p = np.exp(log_q), np.exp(log_p)
    if reverse:
        kl = (p * (log_p - log_q)).sum(axis=1, keepdims=True)
        kl_gradient = p * (log_p - log_q - kl) / tau
    else:
        kl = (q * (log_q - log_p)).sum(axis=1, keepdims=True)
        kl_gradient = (p - q) / tau
    terms = [-(y * log_s).sum() / rows, tau**2 * kl.sum() / rows]
    gradient = (ce_weight * (np.exp(log_s) - y) + kd_weight * tau**2 * kl_gradient) / rows
    return torch.tensor(terms), torch.tensor(gradient)


def run(student, teacher, target, **options):
    student = student.clone().requires_grad_()
    result = distillation_loss(student, teacher, target, **options)
    result.total.backward()
    return result, student.grad


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 10), (64, 100), (7, 1000), (1, 1001)])
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_values_and_gradient_equal_the_definition(rows, classes, tau, reverse_kl):
    inputs = make_logits(rows, classes)
    terms, gradient = definition(*inputs, tau, 0.1, 0.9, reverse=reverse_kl)
    result, grad = run(*inputs, tau=tau, reverse_kl=reverse_kl)
    torch.testing.assert_close(result.terms, terms, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.total, 0.1 * terms[0] + 0.9 * terms[1])
    torch.testing.assert_close(grad, gradient, rtol=1e-10, atol=1e-13)
    assert result.correct == (inputs[0].argmax(1) == inputs[2]).sum()


@pytest.mark.parametrize("soft", [False, True])
def test_soft_targets_and_label_smoothing_equal_the_definition(soft):
    student, teacher, target = make_logits(7, 10)
    if soft:
        target = make_logits(7, 10)[1].flip(1).softmax(1)
    terms, gradient = definition(student, teacher, target, 2.0, 1.0, 0.5, smoothing=0.1)
    result, grad = run(
        student, teacher, target, tau=2.0, ce_weight=1.0, kd_weight=0.5, label_smoothing=0.1
    )
    torch.testing.assert_close(result.terms, terms)
    torch.testing.assert_close(grad, gradient)


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_T2_is_bit_equal_to_dual_path_loss_without_the_prompt_path(dtype, reverse_kl):
    student, teacher, target = make_logits(16, 100, dtype)
    prompt = student.flip(1)
    target[3] = -100
    result, grad = run(student, teacher, target, label_smoothing=0.1, reverse_kl=reverse_kl)
    student.requires_grad_()
    dual = dual_path_loss(
        student, prompt, teacher, target, weights=DualPathWeights(0.1, 0.9, 0.0, 0.0, 0.0, 0.0),
        label_smoothing=0.1, reverse_kl=reverse_kl,
    )  # fmt: skip
    dual.total.backward()
    assert torch.equal(dual.total, result.total)
    assert torch.equal(dual.terms[:2], result.terms)
    assert torch.equal(dual.student_correct, result.correct)
    assert torch.equal(student.grad, grad)


def test_M17_zero_weight_drops_the_gradient_and_keeps_the_value():
    student, teacher, target = make_logits(5, 6)
    full, _ = run(student, teacher, target)
    no_kd, grad = run(student, teacher, target, ce_weight=1.0, kd_weight=0.0)
    expected = student.clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected, target).backward()
    assert torch.equal(no_kd.terms, full.terms)
    assert torch.equal(grad, expected.grad)
    poisoned, grad = run(student, teacher * math.nan, target, ce_weight=1.0, kd_weight=0.0)
    assert torch.equal(grad, expected.grad)
    assert torch.equal(poisoned.total, no_kd.total)


def test_ignored_rows_and_no_rows():
    student, teacher, target = make_logits(6, 5)
    target[[0, 5]] = 9
    result, grad = run(student, teacher, target, ignore_index=9)
    alone, alone_grad = run(student[1:5], teacher[1:5], target[1:5])
    torch.testing.assert_close(result, alone)
    torch.testing.assert_close(grad[1:5], alone_grad)
    assert (grad[[0, 5]] == 0).all()
    for rows in (0, 6):
        nothing, grad = run(student[:rows], teacher[:rows], torch.full((rows,), -100))
        assert nothing.total == 0
        assert nothing.correct == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    student, teacher, target = make_logits(7, 100, dtype)
    result, grad = run(student, teacher, target)
    expected, expected_grad = run(student.float(), teacher.float(), target)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.terms, expected.terms)
    assert torch.equal(grad, expected_grad.to(dtype))


def test_extremes():
    student, teacher, target = make_logits(6, 8, torch.float32)
    result, grad = run(1e4 * student.sign(), 1e4 * teacher.sign(), target, tau=0.5)
    assert result.terms.isfinite().all()
    assert grad.isfinite().all()
    assert run(student, student, target)[0].terms[1] == 0
    student[:, 3] = teacher[:, 3] = -torch.inf
    target[target == 3] = 4
    result, grad = run(student, teacher, target)
    assert result.terms.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[:, 3] == 0).all()


def test_nothing_is_written():
    student, teacher, target = make_logits(3, 4)
    inputs = (student.requires_grad_(), teacher, target)
    versions = [x._version for x in inputs]
    distillation_loss(*inputs).total.backward()
    assert [x._version for x in inputs] == versions


@pytest.mark.parametrize("compiles", [False, True])
def test_a_teacher_that_asks_for_a_gradient_is_refused(compiles):
    student, teacher, target = make_logits(3, 4)
    loss = torch.compile(distillation_loss, backend="eager") if compiles else distillation_loss
    with pytest.raises(ValueError, match=r"^teacher: requires grad, .* order student, teacher, t"):
        loss(teacher, student.requires_grad_(), target)  # in the wrong order


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_gradcheck(reverse_kl):
    student, teacher, target = make_logits(3, 4)

    def loss(z):
        return distillation_loss(z, teacher, target, reverse_kl=reverse_kl).total

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_compiles_as_one_graph():
    student, teacher, target = make_logits(3, 4, torch.float32)
    expected, expected_grad = run(student, teacher, target)
    student.requires_grad_()
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    result = compiled(student, teacher, target)
    result.total.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(student.grad, expected_grad)


def test_what_does_not_fit_is_named():
    z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for arguments, named in (
        ((torch.zeros(4), z, y), "student"),
        ((z, torch.zeros(3, 5), y), "teacher"),
        ((z, z.half(), y), "teacher"),
        ((z, z, y[:1]), "target"),
    ):
        with pytest.raises(ValueError, match=rf"^{named}: expected "):
            distillation_loss(*arguments)
    with pytest.raises(ValueError, match=r"^tau: expected "):
        distillation_loss(z, z, y, tau=0.0)
    with pytest.raises(IndexError):
        distillation_loss(z, z, y + 4)
