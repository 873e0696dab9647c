"""The dual-path method: M13, M14, M15, M17, M18, M21; properties T1, T2 and T7."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.dfpt import TERMS, DualPathDistillation, MixtureControl, path_weights
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep

CPU = torch.device("cpu")
CLASSES, SIZE, BATCH = 10, 16, 8
DEFAULT = LossConfig()
KD_LIMIT = LossConfig(student_ce=0.1, student_teacher=0.9, student_prompt=0.0)


def make_method(method="dfpt", loss=DEFAULT, seed=0):
    """As `engine.run` does it: student first, then the teacher, then what the method adds."""
    torch.manual_seed(seed)
    student = create_model("cifar:resnet8", num_classes=CLASSES)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    teacher = create_model("cifar:resnet14", num_classes=CLASSES)
    torch.set_rng_state(state)
    exact = TeacherConfig(fold_bn=False)  # the bits of the other methods' teacher
    config = RunConfig(method=method, loss=loss, teacher=exact)
    return build_method(config, student, teacher).train()


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, CLASSES, (BATCH,), generator=generator)


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def is_zero(module):
    return all((g == 0).all() for g in gradients(module).values())


def backward(method, images, target, **loss):
    """Gradients of student and prompt path under other weights, from the same state."""
    method.zero_grad()
    method.loss = dataclasses.replace(LossConfig(), **loss)
    output = method(images, target)
    output.total.backward()
    return output, gradients(method.student), gradients(method.teacher)


def bits_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# T2: the vanilla KD limit -------------------------------------------------------------------------


def trajectory(method_name, loss, steps=5):
    """Student after each step of real training: augmented batches, momentum, decay, schedule."""
    data_config = DataConfig(
        name="synthetic", num_classes=CLASSES, image_size=SIZE, limit=BATCH * steps, crop_padding=2
    )
    data = load_data(data_config, CPU)
    method = make_method(method_name, loss)
    config = RunConfig(
        method=method_name, loss=loss, data=data_config, global_batch=BATCH, epochs=1, device="cpu"
    )
    step = TrainStep(method, config, data, total_steps=steps, steps_per_epoch=steps, device=CPU)
    states = []
    for i, batch in enumerate(train_batches(data.train, batch_size=BATCH, seed=3, epoch=0)):
        step(batch, i)
        states.append({k: v.clone() for k, v in method.student.state_dict().items()})
    assert len(states) == steps
    return states


def test_M15_T2_without_prompt_term_the_student_walks_as_under_kd():
    kd = trajectory("kd", LossConfig())
    assert not bits_equal(kd[0], kd[-1])
    dfpt = trajectory("dfpt", KD_LIMIT)
    assert all(bits_equal(a, b) for a, b in zip(kd, dfpt, strict=True))
    control = trajectory("dfpt", dataclasses.replace(KD_LIMIT, student_prompt=0.5), steps=5)
    assert not bits_equal(kd[0], control[0])


def test_M15_T2_holds_for_dfpt_plus_too():
    kd, plus = (
        trajectory(m, loss, 2) for m, loss in (("kd", LossConfig()), ("dfpt_plus", KD_LIMIT))
    )
    assert bits_equal(kd[-1], plus[-1])


# T7: disjoint gradients ---------------------------------------------------------------------------

NO_STUDENT_LOSS = {"student_ce": 0.0, "student_teacher": 0.0, "student_prompt": 0.0}
NO_PROMPT_LOSS = {"prompt_ce": 0.0, "prompt_teacher": 0.0, "prompt_student": 0.0}


@pytest.mark.parametrize("reverse_kl", [False, True])
@pytest.mark.parametrize("name", ["dfpt", "dfpt_plus"])
def test_T7_one_backward_equals_two(name, reverse_kl):
    method = make_method(name).double()
    images, target = make_batch()
    options = {"reverse_kl": reverse_kl}
    _, both_student, both_prompt = backward(method, images, target, **options)
    _, student, none = backward(method, images, target, **NO_PROMPT_LOSS, **options)
    assert all((g == 0).all() for g in none.values()), "L_S gave phi a gradient"
    _, none, prompt = backward(method, images, target, **NO_STUDENT_LOSS, **options)
    assert all((g == 0).all() for g in none.values()), "L_P gave psi a gradient"
    torch.testing.assert_close(both_student, student, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(both_prompt, prompt, rtol=1e-12, atol=1e-15)
    assert len(both_student) == len(list(method.student.parameters()))
    assert all(g.abs().sum() > 0 for g in both_student.values())


def test_T7_control_supervisors_that_are_not_detached_mix_the_gradients():
    method = make_method().double()
    images, target = make_batch()
    _, _, sound = backward(method, images, target)
    method.zero_grad()
    teacher, prompt = method.teacher(images)
    student, loss = method.student(images), LossConfig()

    def kl(supervisor, learner):
        log_q, log_p = ((z / loss.tau).log_softmax(1) for z in (supervisor, learner))
        return loss.tau**2 * (log_q.exp() * (log_q - log_p)).sum(1).mean()

    student_loss = F.cross_entropy(student, target) + kl(teacher, student) + kl(prompt, student)
    prompt_loss = F.cross_entropy(prompt, target) + kl(teacher, prompt) + kl(student, prompt)
    student_loss.backward(retain_graph=True)
    assert not is_zero(method.teacher)
    prompt_loss.backward()
    leaked = gradients(method.teacher)
    assert any(not torch.allclose(leaked[name], sound[name], rtol=1e-6) for name in sound)


# Terms, weights, warm-up --------------------------------------------------------------------------


def test_M17_M18_loss_equals_the_written_objective():
    method = make_method().double().eval()
    images, target = make_batch()
    weights = {
        "student_ce": 0.3, "student_teacher": 0.7, "student_prompt": 1.1,
        "prompt_ce": 0.9, "prompt_teacher": 0.5, "prompt_student": 1.3,
    }  # fmt: skip
    method.loss = LossConfig(tau=3.0, **weights)
    output = method(images, target)
    z_S, z_P = method.student(images), method.prompt_logits(images)
    z_T = method.teacher_logits(images)

    def kl(q, p):
        q, p = (q / 3).softmax(1), (p / 3).softmax(1)
        return 9 * (q * (q / p).log()).sum(1).mean()

    terms = {
        "student_ce": F.cross_entropy(z_S, target),
        "student_teacher": kl(z_T, z_S),
        "student_prompt": kl(z_P, z_S),
        "prompt_ce": F.cross_entropy(z_P, target),
        "prompt_teacher": kl(z_T, z_P),
        "prompt_student": kl(z_S, z_P),
    }
    assert tuple(output.terms) == method.term_names == TERMS
    torch.testing.assert_close(output.terms, {k: v.detach() for k, v in terms.items()})
    torch.testing.assert_close(output.total, sum(weights[k] * terms[k] for k in TERMS))
    assert output.student_correct == (z_S.argmax(1) == target).sum()
    assert output.prompt_correct == (z_P.argmax(1) == target).sum()


@pytest.mark.parametrize("distillation", [0.0, 0.25, 1.0])
def test_warm_up_scales_the_divergences_and_not_the_labels(distillation):
    method = make_method().double().eval()
    output = method(*make_batch(), distillation)
    terms = output.terms
    labels = terms["student_ce"] + terms["prompt_ce"]
    torch.testing.assert_close(
        output.total.detach(), labels + distillation * (sum(terms.values()) - labels)
    )
    weights = path_weights(LossConfig(student_prompt=2.0), distillation)
    assert weights.student_prompt == 2 * distillation
    assert weights.prompt_ce == weights.student_ce == 1.0


def test_M18_without_reversed_supervision_the_prompt_path_ignores_the_student():
    method = make_method().double()
    images, target = make_batch()

    def prompt_gradient(prompt_student):
        return backward(method, images, target, prompt_student=prompt_student)[2]

    before = prompt_gradient(0.0), prompt_gradient(1.0)
    with torch.no_grad():
        for param in method.student.parameters():
            param.mul_(1.5)
    after = prompt_gradient(0.0), prompt_gradient(1.0)
    assert bits_equal(before[0], after[0])
    assert not bits_equal(before[1], after[1])


# Parameters and state -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dfpt", "dfpt_plus"])
def test_M13_M14_groups_hold_every_trained_parameter_once(name):
    method = make_method(name)
    optim = OptimConfig(lr=0.05, prompt_lr_scale=0.5, backbone_lr_scale=0.01)
    groups = {g["name"]: g for g in method.parameter_groups(optim)}
    rates = {"student": 0.05, "prompt": 0.025, "backbone": 0.00025}
    if name == "dfpt":
        del rates["backbone"]
    assert {n: g["lr"] for n, g in groups.items()} == pytest.approx(rates)
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(p) for p in method.parameters() if p.requires_grad}
    assert {id(p) for p in groups["student"]["params"]} == {
        id(p) for p in method.student.parameters()
    }
    assert not any(p.requires_grad for p in method.teacher.original.parameters())


@pytest.mark.parametrize("name", ["dfpt", "dfpt_plus"])
def test_trained_state_restores_another_method(name):
    first, second = make_method(name, seed=0), make_method(name, seed=1)
    images, target = make_batch(torch.float32)
    first(images, target)  # moves BN statistics
    state = first.trained_state()
    assert {k.split(".")[0] for k in state} == {"student", "prompt"}
    assert not any("original" in k for k in state)
    second.load_trained_state(state)
    assert bits_equal(second.trained_state(), state)
    outputs = [m.eval()(images, target).terms for m in (first, second)]
    assert bits_equal(*outputs)
    incomplete = {k: v for k, v in state.items() if k != "student.fc.bias"}
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        second.load_trained_state(incomplete)
    with pytest.raises(RuntimeError, match="stranger"):
        second.load_trained_state({**state, "prompt.stranger": torch.zeros(1)})


# T1: the mixture ----------------------------------------------------------------------------------


def minimise(objective, start):
    """Logits at which a smooth convex-by-row objective has its minimum, by Newton-like L-BFGS."""
    z = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = objective(z)
        value.backward()
        return value

    optimizer.step(closure)
    return z.detach()


MIXTURES = [
    pytest.param(
        LossConfig(tau=4.0, prompt_teacher=0.7, prompt_student=1.3, prompt_ce=0.0), id="4"
    ),
    pytest.param(
        LossConfig(tau=1.0, prompt_teacher=0.7, prompt_student=1.3, prompt_ce=0.4), id="1"
    ),
    pytest.param(LossConfig(tau=1.0, prompt_teacher=1.0, prompt_student=0.0), id="teacher"),
    pytest.param(
        LossConfig(tau=4.0, prompt_teacher=0.7, prompt_student=1.3, prompt_ce=0.0, reverse_kl=True),
        id="reversed",
    ),
]


def make_mixture(loss):
    return make_method(loss=dataclasses.replace(loss, mixture_control=True))


def logits_and_labels(rows=5, classes=6):
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("loss", MIXTURES)
def test_M21_T1_the_mixture_is_where_an_unconstrained_prompt_path_ends(loss):
    student, teacher, target = logits_and_labels()

    def prompt_loss(z):
        def kl(supervisor):
            log_q, log_p = ((x / loss.tau).log_softmax(1) for x in (supervisor, z))
            if loss.reverse_kl:
                log_q, log_p = log_p, log_q
            return loss.tau**2 * (log_q.exp() * (log_q - log_p)).sum()

        ce = F.cross_entropy(z, target, reduction="sum")
        divergence = loss.prompt_teacher * kl(teacher) + loss.prompt_student * kl(student)
        return loss.prompt_ce * ce + divergence

    found = (minimise(prompt_loss, teacher) / loss.tau).softmax(1)
    mixture = make_mixture(loss).mixture_logits(student, teacher, target)
    torch.testing.assert_close((mixture / loss.tau).softmax(1), found, rtol=0, atol=1e-6)
    assert prompt_loss(mixture) <= prompt_loss(loss.tau * found.log()) + 1e-12


def test_M21_T1_closed_forms():
    student, teacher, target = logits_and_labels()
    p_T, p_S = ((z / 4).softmax(1) for z in (teacher, student))
    loss = LossConfig(tau=4.0, prompt_teacher=0.5, prompt_student=1.5)
    arithmetic = (make_mixture(loss).mixture_logits(student, teacher, target) / 4).softmax(1)
    torch.testing.assert_close(arithmetic, 0.25 * p_T + 0.75 * p_S)

    reverse = dataclasses.replace(loss, reverse_kl=True)
    geometric = (make_mixture(reverse).mixture_logits(student, teacher, target) / 4).softmax(1)
    mean = p_T**0.25 * p_S**0.75
    torch.testing.assert_close(geometric, mean / mean.sum(1, keepdim=True))

    at_one = LossConfig(tau=1.0, prompt_teacher=1.0, prompt_student=2.0, prompt_ce=1.0)
    with_label = make_mixture(at_one).mixture_logits(student, teacher, target).softmax(1)
    one_hot = F.one_hot(target, 6)
    expected = (teacher.softmax(1) + 2 * student.softmax(1) + one_hot) / 4
    torch.testing.assert_close(with_label, expected)


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_M21_control_arm_distils_exactly_the_mixture(reverse_kl):
    loss = LossConfig(
        tau=4.0, student_ce=0.3, student_teacher=0.6, student_prompt=1.2, prompt_teacher=0.5,
        prompt_student=1.5, mixture_control=True, reverse_kl=reverse_kl,
    )  # fmt: skip
    method = make_method(loss=loss).double().eval()
    images, target = make_batch()
    output = method(images, target, 0.5)
    output.total.backward()
    got = gradients(method.student)
    method.zero_grad()

    z_S = method.student(images)
    log_S, log_T = ((z / 4).log_softmax(1) for z in (z_S, method.teacher_logits(images)))
    shares = 0.25 * log_T.exp() + 0.75 * log_S.exp()
    if reverse_kl:
        shares = (0.25 * log_T + 0.75 * log_S).softmax(1)
    log_mixture = shares.detach().log()

    def kl(log_q):
        log_q, log_p = (log_S, log_q) if reverse_kl else (log_q, log_S)
        return 16 * (log_q.exp() * (log_q - log_p)).sum(1).mean()

    terms = F.cross_entropy(z_S, target), kl(log_T), kl(log_mixture)
    total = 0.3 * terms[0] + 0.5 * (0.6 * terms[1] + 1.2 * terms[2])
    total.backward()
    torch.testing.assert_close(output.total, total)
    torch.testing.assert_close(
        torch.stack(list(output.terms.values())), torch.stack(terms).detach()
    )
    torch.testing.assert_close(got, gradients(method.student), rtol=1e-9, atol=1e-12)
    assert tuple(output.terms) == method.term_names
    assert output.prompt_correct is None


def test_M21_control_arm_makes_the_mixture_in_fp32_under_autocast():
    """Rounded to bf16, the mixture's log-probabilities would be off by up to 0.4 %."""
    method = make_method(loss=LossConfig(mixture_control=True)).eval()
    images, target = make_batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = method.student(images), method.teacher_logits(images)
        output = method(images, target)
    student, teacher = student.double(), teacher.double()
    mixture = (teacher / 4).softmax(1) / 2 + (student / 4).softmax(1) / 2
    kl = 16 * (mixture * (mixture.log() - (student / 4).log_softmax(1))).sum(1).mean()
    assert output.terms["student_prompt"].item() == pytest.approx(kl.item(), rel=1e-4)


def test_M21_control_arm_has_no_prompt_modules():
    method = make_mixture(LossConfig())
    assert isinstance(method, MixtureControl)
    assert not isinstance(method, DualPathDistillation)
    assert [g["name"] for g in method.parameter_groups(OptimConfig())] == ["student"]
    assert all(k.startswith("student.") for k in method.trained_state())
    assert not method.teacher.training
    assert isinstance(method.teacher, nn.Module)
    output = method(*make_batch(torch.float32))
    output.total.backward()
    assert math.isfinite(output.total.item())
    assert not gradients(method.teacher)
