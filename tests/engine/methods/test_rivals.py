"""ce, kd, dkd and dist against their published losses, written out (M15, M16, M22)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.dist import pearson
from dfptkd.engine.methods.dkd import decoupled_kl
from dfptkd.engine.metrics import normaliser
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep

CPU = torch.device("cpu")
METHODS = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")
DEFAULT = LossConfig()
RIVALS = ("kd", "dkd", "dist")
LABEL_TERMS = {"ce", "student_ce", "prompt_ce"}


class Logits(nn.Module):
    """A network whose logits are its parameter, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def make_logits(rows=7, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


def run(name, loss=DEFAULT, distillation=1.0, logits=None):
    """Output of a method on given logits, and the gradient towards the student's."""
    student, teacher, target = logits or make_logits()
    method = build_method(RunConfig(method=name, loss=loss), Logits(student), Logits(teacher))
    output = method(torch.zeros(len(target), 3, 1, 1), target, distillation)
    output.total.backward()
    return output, method.student.logits.grad


def assert_is(name, expected, expected_terms, loss):
    """`name` gives the loss `expected(student, teacher, target)`, value and gradient."""
    output, grad = run(name, loss)
    student, teacher, target = make_logits()
    student.requires_grad_()
    terms = expected_terms(student, teacher, target)
    total = expected(**terms)
    total.backward()
    torch.testing.assert_close(output.total, total)
    torch.testing.assert_close(output.terms, {k: v.detach() for k, v in terms.items()})
    torch.testing.assert_close(grad, student.grad, rtol=1e-9, atol=1e-12)
    assert output.student_correct == (student.argmax(1) == target).sum()
    assert output.prompt_correct is None


def test_M16_ce_is_cross_entropy():
    def terms(student, teacher, target):
        log_p = student - student.exp().sum(1, keepdim=True).log()
        return {"ce": -log_p[torch.arange(7), target].mean()}

    assert_is("ce", lambda ce: ce, terms, LossConfig())


def test_M15_kd_is_hintons_loss():
    def terms(student, teacher, target):
        q, p = (teacher / 4).softmax(1), (student / 4).softmax(1)
        kl = 16 * (q * (q / p).log()).sum(1).mean()
        return {"ce": F.cross_entropy(student, target), "kl": kl}

    assert_is("kd", lambda ce, kl: 0.1 * ce + 0.9 * kl, terms, LossConfig())


def test_dkd_is_the_published_loss():
    def terms(student, teacher, target):
        """By indices, as in the paper's equations 2 to 7: no mask, no large constant."""
        target_part, nontarget_part = [], []
        for s, t, label in zip(student, teacher, target.tolist(), strict=True):
            p, q = (s / 4).softmax(0), (t / 4).softmax(0)
            others = [c for c in range(10) if c != label]
            b_p, b_q = p[label], q[label]
            target_part.append(b_q * (b_q / b_p).log() + (1 - b_q) * ((1 - b_q) / (1 - b_p)).log())
            p_hat, q_hat = p[others] / p[others].sum(), q[others] / q[others].sum()
            nontarget_part.append((q_hat * (q_hat / p_hat).log()).sum())
        return {
            "ce": F.cross_entropy(student, target),
            "target": 16 * torch.stack(target_part).mean(),
            "nontarget": 16 * torch.stack(nontarget_part).mean(),
        }

    loss = LossConfig(dkd_ce=1.0, dkd_alpha=0.5, dkd_beta=6.0)
    assert_is("dkd", lambda ce, target, nontarget: ce + 0.5 * target + 6 * nontarget, terms, loss)


def test_dist_is_the_published_loss():
    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())

    def terms(student, teacher, target):
        p, q = (student / 4).softmax(1), (teacher / 4).softmax(1)
        rows = torch.stack([correlation(a, b) for a, b in zip(p, q, strict=True)])
        columns = torch.stack([correlation(a, b) for a, b in zip(p.T, q.T, strict=True)])
        return {
            "ce": F.cross_entropy(student, target),
            "inter": 16 * (1 - rows.mean()),
            "intra": 16 * (1 - columns.mean()),
        }

    loss = LossConfig(dist_ce=1.0, dist_inter=2.0, dist_intra=3.0)
    assert_is("dist", lambda ce, inter, intra: ce + 2 * inter + 3 * intra, terms, loss)


def test_dist_of_one_image_is_finite():
    """A single row has no spread over the batch: correlation 0, gradient finite."""
    output, grad = run("dist", logits=make_logits(rows=1))
    assert output.total.isfinite()
    assert grad.isfinite().all()


def test_dist_correlates_along_the_given_axis():
    a, _, _ = make_logits(4, 5)
    torch.testing.assert_close(pearson(a, 3 * a + 2, dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(pearson(a, -a, dim=0), -torch.ones(5, dtype=torch.float64))


# T6: the two parts of the divergence --------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12), st.integers(0, 1000), st.floats(0.1, 60), st.sampled_from([0.5, 1.0, 4.0])
)
def test_M22_T6_parts_sum_to_the_whole(classes, seed, scale, tau):
    student, teacher, target = make_logits(5, classes, seed)
    student, teacher = scale * student, scale * teacher
    parts = decoupled_kl(teacher, student, target, tau)
    log_q, log_p = (teacher / tau).log_softmax(1), (student / tau).log_softmax(1)
    whole = (log_q.exp() * (log_q - log_p)).sum(1)
    total = parts.target + (1 - parts.target_prob) * parts.nontarget
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.target_prob, log_q.exp()[torch.arange(5), target])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [5.0, 20.0, 50.0, 200.0, 1e4])
@pytest.mark.parametrize("confident", ["teacher", "student", "both"])
def test_M22_T6_holds_where_the_target_takes_all_probability(margin, confident, dtype):
    student, teacher, target = make_logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    rows = torch.arange(7)
    if confident != "student":
        teacher[rows, target] += margin
    if confident != "teacher":
        student[rows, target] += margin
    student.requires_grad_()
    parts = decoupled_kl(teacher, student, target, 1.0)
    log_q, log_p = teacher.log_softmax(1), student.log_softmax(1)
    whole = (log_q.exp() * (log_q - log_p)).sum(1)
    total = parts.target + (1 - parts.target_prob) * parts.nontarget
    torch.testing.assert_close(total, whole, rtol=20 * torch.finfo(dtype).eps, atol=1e-5)
    (parts.target.sum() + parts.nontarget.sum()).backward()
    assert student.grad.isfinite().all()
    # The non-target part sees the other classes alone, however confident the two are.
    others = torch.ones(7, 10, dtype=torch.bool).scatter_(1, target[:, None], False)
    q, p = (z.detach()[others].view(7, 9).double() for z in (teacher, student))
    expected = (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1)
    torch.testing.assert_close(parts.nontarget.double(), expected, rtol=1e-4, atol=1e-5)


# What all methods share ---------------------------------------------------------------------------


def make_real(name, loss=DEFAULT, seed=0):
    torch.manual_seed(seed)
    student = create_model("cifar:resnet8", num_classes=10)
    teacher = None if name == "ce" else create_model("cifar:resnet14", num_classes=10)
    return build_method(RunConfig(method=name, loss=loss), student, teacher)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("distillation", [0.0, 0.25])
def test_warm_up_scales_every_term_but_the_labels(name, distillation):
    method = make_real(name).eval()
    images, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    with torch.no_grad():
        zero, part, full = (
            method(images, target, d).total.item() for d in (0.0, distillation, 1.0)
        )
        terms = method(images, target).terms
    assert part == pytest.approx(zero + distillation * (full - zero), rel=1e-5)
    weight = 0.1 if name == "kd" else 1.0
    labels = weight * sum(v.item() for k, v in terms.items() if k in LABEL_TERMS)
    assert zero == pytest.approx(labels, rel=1e-5)
    assert name == "ce" or full > zero


@pytest.mark.parametrize("name", RIVALS)
def test_a_frozen_teacher_stays_as_it_is(name):
    method = make_real(name).train()
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method(torch.randn(4, 3, 16, 16), torch.arange(4)).total.backward()
    assert method.student.training
    assert not any(m.training for m in method.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert not method.teacher_logits(torch.randn(1, 3, 16, 16)).requires_grad
    assert method.prompt_logits(torch.randn(1, 3, 16, 16)) is None
    groups = method.parameter_groups(OptimConfig(lr=0.3))
    assert [(g["name"], g["lr"]) for g in groups] == [("student", 0.3)]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in method.student.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_terms_carry_their_declared_names_and_no_graph(name):
    output = make_real(name)(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert tuple(output.terms) == make_real(name).term_names
    assert all(t.dim() == 0 and not t.requires_grad for t in output.terms.values())
    assert output.total.requires_grad
    assert output.student_correct.dtype == torch.int64
    assert (output.prompt_correct is not None) == name.startswith("dfpt")


@pytest.mark.parametrize("name", METHODS)
def test_label_smoothing_reaches_every_method(name):
    images, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    plain = make_real(name).eval()
    smooth = make_real(name, LossConfig(label_smoothing=0.2)).eval()
    key = plain.term_names[0]
    logits = plain.student(images)
    expected = F.cross_entropy(logits, target, label_smoothing=0.2)
    assert smooth(images, target).terms[key].item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain(images, target).terms[key].item() != pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "ce"])
def test_a_method_without_its_teacher_is_refused(name):
    with pytest.raises(TypeError, match=name):
        build_method(RunConfig(method=name), create_model("cifar:resnet8", num_classes=2), None)


@pytest.mark.parametrize("name", ["ce", "kd"])
def test_trained_state_is_the_student(name):
    method, other = make_real(name, seed=0), make_real(name, seed=1)
    state = method.trained_state()
    assert set(state) == {f"student.{k}" for k in method.student.state_dict()}
    other.load_trained_state(state)
    assert all(torch.equal(v, state[k]) for k, v in other.trained_state().items())


def test_M16_ce_in_the_engine_is_the_loop_one_would_write():
    data_config = DataConfig(name="synthetic", num_classes=10, image_size=16, limit=32)
    data = load_data(data_config, CPU)
    config = RunConfig(method="ce", global_batch=8, epochs=1, device="cpu", data=data_config)
    method = make_real("ce").train()
    step = TrainStep(method, config, data, total_steps=4, steps_per_epoch=4, device=CPU)

    plain = make_real("ce").student.train()
    optim = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    rates = [0.05, 0.05, 0.005, 0.0005]  # milestones 0.625, 0.75, 0.875 of 4 steps: 2, 3, 4
    normalise, losses = normaliser(data), []
    for i, batch in enumerate(train_batches(data.train, batch_size=8, seed=0, epoch=0)):
        step(batch, i)
        optim.param_groups[0]["lr"] = 0.05 * 0.1 ** sum(i >= m for m in (2, 3, 4))
        assert optim.param_groups[0]["lr"] == pytest.approx(rates[i])
        optim.zero_grad()
        loss = F.cross_entropy(plain(normalise(batch)), batch.labels)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(method.student.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    means = step.meter.read(has_prompt_path=False)
    assert means["loss/ce"] == pytest.approx(math.fsum(losses) / 4)
