"""DFPT-KD with terms of RKD and DKD: M49."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfptkd.engine.config import DataConfig, LossConfig, RunConfig, TeacherConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.combined import CombinedDistillation, added_names
from dfptkd.engine.methods.dfpt import TERMS, DualPathDistillation
from dfptkd.engine.methods.rkd import relational_terms
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep

CPU = torch.device("cpu")
CLASSES, SIZE, BATCH = 10, 16, 8
PLAIN = LossConfig()
RKD = LossConfig(rkd_distance=25.0, rkd_angle=50.0)
DECOUPLED = LossConfig(decoupled=True, dkd_alpha=0.7, dkd_beta=2.0)
PARTS = (
    "student_teacher_target", "student_teacher_nontarget",
    "student_prompt_target", "student_prompt_nontarget",
)  # fmt: skip


def make_method(loss=PLAIN, method="dfpt", student="cifar:resnet8", seed=0, **changes):
    torch.manual_seed(seed)
    student = create_model(student, num_classes=CLASSES)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    teacher = create_model("cifar:resnet14", num_classes=CLASSES)
    torch.set_rng_state(state)
    config = RunConfig(
        method=method, loss=loss, teacher=TeacherConfig(fold_bn=False), seed=seed, **changes
    )
    return build_method(config, student, teacher).train()


def make_batch(dtype=torch.float64, rows=BATCH):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, CLASSES, (rows,), generator=generator)


def make_features(rows=5, student=6, supervisor=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for width in (student, supervisor)
    )


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def bits_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# RKD ----------------------------------------------------------------------------------------------


def huber(difference):
    size = abs(difference)
    return size**2 / 2 if size < 1 else size - 0.5


def written_out_rkd(student, supervisor, power=2, swap=False):
    """Both terms by the paper's equations, one pair and one triple at a time."""
    if swap:
        student, supervisor = supervisor, student

    def length(v):
        return sum(abs(float(x)) ** power for x in v) ** (1 / power)

    def relations(f):
        n = len(f)
        distances = [[length(f[i] - f[j]) for j in range(n)] for i in range(n)]
        mu = sum(map(sum, distances)) / (n * (n - 1))
        psi_D = {(i, j): distances[i][j] / mu for i in range(n) for j in range(n)}
        psi_A = {}
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    if j in (i, k):
                        psi_A[i, j, k] = 0.0
                        continue
                    a, b = f[i] - f[j], f[k] - f[j]
                    psi_A[i, j, k] = float((a / length(a)) @ (b / length(b)))
        return psi_D, psi_A

    found = []
    for ours, theirs in zip(relations(student), relations(supervisor), strict=True):
        found.append(sum(huber(ours[key] - theirs[key]) for key in ours) / len(ours))
    return found


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_M49_rkd_is_the_papers_two_terms(rows):
    student, supervisor = make_features(rows)
    supervisor *= 7  # the scale of features does not count
    found = [term.item() for term in relational_terms(student, supervisor)]
    assert found == pytest.approx(written_out_rkd(student, supervisor), rel=1e-12)
    assert all((term > 1e-12) == (rows > 2) for term in found)  # two images: one distance, no angle


def test_M49_rkd_control_another_norm_or_no_angle_shows():
    student, supervisor = make_features()
    found = [term.item() for term in relational_terms(student, supervisor)]
    for wrong in (written_out_rkd(student, supervisor, power=1), reversed(found)):
        assert found != pytest.approx(list(wrong), rel=1e-3)


def test_M49_rkd_of_features_that_lie_alike_is_0():
    student, _ = make_features()
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    for term in relational_terms(student, 3 * student @ turn + 1):
        assert term.item() == pytest.approx(0, abs=1e-24)


def test_M49_rkd_gradient_is_right_and_goes_to_the_student_alone():
    student, supervisor = (f.requires_grad_() for f in make_features(4))
    assert torch.autograd.gradcheck(lambda s: relational_terms(s, supervisor), [student])
    sum(relational_terms(student, supervisor)).backward()
    assert supervisor.grad is None
    assert student.grad.abs().sum() > 0


def test_M49_rkd_of_equal_images_is_finite():
    """A student at its start may see two images as one; of one image, or equal ones, nothing."""
    student, supervisor = make_features()
    student[1] = student[0]
    student.requires_grad_()
    sum(relational_terms(student, supervisor)).backward()
    assert student.grad.isfinite().all()
    nothing = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    terms = relational_terms(nothing, nothing)
    sum(terms).backward()
    assert [t.item() for t in terms] == [0.0, 0.0]
    assert (nothing.grad == 0).all()


# DKD's parts --------------------------------------------------------------------------------------


def written_out_dkd(supervisor, learner, target, tau):
    """Target and non-target part, one row and one class at a time, means over the rows."""
    parts = []
    rows = [(z / tau).softmax(1).tolist() for z in (supervisor, learner)]
    for q, p, y in zip(*rows, target.tolist(), strict=True):
        rest = [c for c in range(len(q)) if c != y]
        binary = q[y] * math.log(q[y] / p[y])
        binary += (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        others = 0.0
        for c in rest:
            q_c, p_c = q[c] / (1 - q[y]), p[c] / (1 - p[y])
            others += q_c * math.log(q_c / p_c)
        parts.append((binary, others))
    return [tau**2 * sum(column) / len(parts) for column in zip(*parts, strict=True)]


def test_M49_decoupled_terms_are_dkds_under_either_supervisor():
    loss = dataclasses.replace(DECOUPLED, tau=3.0, student_teacher=0.6, student_prompt=1.3)
    method = make_method(loss).double().eval()
    images, target = make_batch()
    output = method(images, target, 0.5)
    assert tuple(output.terms) == method.term_names == (*TERMS, *PARTS)
    z_S, z_P, z_T = method.all_logits(images)
    expected = [x for z in (z_T, z_P) for x in written_out_dkd(z, z_S, target, 3.0)]
    assert [output.terms[name].item() for name in PARTS] == pytest.approx(expected, rel=1e-10)
    t = {name: value.item() for name, value in output.terms.items()}
    student = t["student_ce"] + 0.5 * (
        0.6 * (0.7 * expected[0] + 2.0 * expected[1])
        + 1.3 * (0.7 * expected[2] + 2.0 * expected[3])
    )
    prompt = t["prompt_ce"] + 0.5 * (t["prompt_teacher"] + t["prompt_student"])
    assert output.total.item() == pytest.approx(student + prompt, rel=1e-10)
    swapped = [*expected[2:], *expected[:2]]
    assert [output.terms[name].item() for name in PARTS] != pytest.approx(swapped, rel=1e-3)


def test_M49_decoupled_with_the_weights_of_the_identity_is_the_whole_term():
    """T6: at a beta of 1 - p_t, the same for all rows, alpha 1 gives the plain objective."""
    images, target = make_batch(rows=1)
    plain = make_method().double().eval()
    expected = plain(images, target)
    expected.total.backward()
    z_T = plain.teacher_logits(images)
    z_P = plain.prompt_logits(images).detach()
    for alone, z in (("student_teacher", z_T), ("student_prompt", z_P)):
        other = "student_prompt" if alone == "student_teacher" else "student_teacher"
        beta = 1 - (z / 4).softmax(1)[0, target[0]].item()
        loss = LossConfig(decoupled=True, dkd_alpha=1.0, dkd_beta=beta, **{other: 0.0})
        found = make_method(loss).double().eval()
        output = found(images, target)
        output.total.backward()
        whole = make_method(LossConfig(**{other: 0.0})).double().eval()
        reference = whole(images, target)
        reference.total.backward()
        torch.testing.assert_close(output.total, reference.total)
        torch.testing.assert_close(gradients(found), gradients(whole), rtol=1e-8, atol=1e-12)


# In the method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [RKD, DECOUPLED], ids=["rkd", "decoupled"])
@pytest.mark.parametrize("name", ["dfpt", "dfpt_plus"])
def test_M49_T7_the_added_terms_teach_the_student_alone(name, loss):
    images, target = make_batch()
    plain, combined = (make_method(x, name).double() for x in (PLAIN, loss))
    for method in (plain, combined):
        output = method(images, target)
        output.total.backward()
    torch.testing.assert_close(
        gradients(combined.teacher), gradients(plain.teacher), rtol=1e-9, atol=1e-12
    )
    ours, theirs = gradients(combined.student), gradients(plain.student)
    assert ours.keys() == theirs.keys()
    assert all(not torch.allclose(ours[k], theirs[k], rtol=1e-3) for k in ours if "fc" not in k)


def test_M49_rkd_reads_the_prompt_paths_features():
    """And not the original path's; those of the student are what its last layer reads."""
    method = make_method(RKD).double().eval()
    images, target = make_batch()
    read = {}
    method.student.fc.register_forward_pre_hook(lambda _, args: read.update(student=args[0]))
    method.teacher.head[-1].register_forward_pre_hook(lambda _, args: read.update(prompt=args[0]))
    method.teacher.original.head[-1].register_forward_pre_hook(
        lambda _, args: read.update(teacher=args[0])
    )
    output = method(images, target, 0.5)
    names = ("rkd_distance", "rkd_angle")
    found = [output.terms[name] for name in names]
    torch.testing.assert_close(
        found, [t.detach() for t in relational_terms(read["student"], read["prompt"])]
    )
    other = [t.detach() for t in relational_terms(read["student"], read["teacher"])]
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(found, other, strict=True))
    plain = make_method().double().eval()(images, target, 0.5)
    torch.testing.assert_close(output.total, plain.total + 0.5 * (25 * found[0] + 50 * found[1]))
    assert bits_equal({k: output.terms[k] for k in TERMS}, plain.terms)
    assert tuple(output.terms) == method.term_names == (*TERMS, *names)


def test_M49_rkd_is_made_in_full_precision_under_autocast():
    method = make_method(RKD).eval()
    images, target = make_batch(torch.float32)
    seen = {}
    method.relations = lambda *features: (
        seen.update(dtypes={f.dtype for f in features}, autocast=torch.is_autocast_enabled("cpu"))
        or {}
    )
    with torch.autocast("cpu", torch.bfloat16):
        method(images, target)
    assert seen == {"dtypes": {torch.float32}, "autocast": False}


def trajectory(loss, change=lambda method: None, steps=3, **run):
    """All that is trained after some real steps: momentum, decay, augmentation."""
    data_config = DataConfig(
        name="synthetic", num_classes=CLASSES, image_size=SIZE, limit=BATCH * steps
    )
    data = load_data(data_config, CPU)
    method = make_method(loss)
    change(method)
    config = RunConfig(
        method="dfpt", loss=loss, data=data_config, global_batch=BATCH, device="cpu", **run
    )
    step = TrainStep(method, config, data, total_steps=steps, steps_per_epoch=steps, device=CPU)
    for i, batch in enumerate(train_batches(data.train, batch_size=BATCH, seed=3, epoch=0)):
        step(batch, i)
    return {k: v.clone() for k, v in method.trained_state().items()}


def test_M49_weight_0_leaves_every_bit():
    zero = LossConfig(rkd_distance=0.0, rkd_angle=0.0, crd=0.0, decoupled=False)
    assert zero == PLAIN
    assert added_names(zero) == ()
    assert type(make_method(zero)) is DualPathDistillation
    assert type(make_method(RKD)) is CombinedDistillation
    plain = trajectory(PLAIN)
    assert bits_equal(plain, trajectory(zero))
    assert not bits_equal(plain, trajectory(RKD))
    assert not bits_equal(plain, trajectory(DECOUPLED))


def test_M49_the_students_pieces_walk_as_the_student_itself():
    """With terms of weight next to nothing the walk is the plain one, whatever gives the logits."""
    tiny = LossConfig(rkd_distance=1e-30)
    torch.testing.assert_close(trajectory(tiny), trajectory(PLAIN), rtol=1e-4, atol=1e-5)


def test_M49_accumulated_parts_relate_their_own_images():
    torch.testing.assert_close(
        trajectory(DECOUPLED, lambda m: m.eval(), accumulate=2),
        trajectory(DECOUPLED, lambda m: m.eval()),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    whole, parts = (trajectory(RKD, lambda m: m.eval(), accumulate=n) for n in (1, 2))
    assert not torch.allclose(whole["student.fc.weight"], parts["student.fc.weight"], rtol=1e-4)


def test_M49_a_student_whose_features_are_unknown_is_refused():
    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * SIZE * SIZE, CLASSES)

        def forward(self, images):
            return self.fc(images.flatten(1))

    teacher = create_model("cifar:resnet8", num_classes=CLASSES)
    with pytest.raises(UsageError, match="Stranger as student are not known"):
        build_method(RunConfig(loss=RKD), Stranger(), teacher)
    made = build_method(RunConfig(loss=DECOUPLED), Stranger(), teacher)
    assert math.isfinite(made(*make_batch(torch.float32)).total.item())


@pytest.mark.parametrize(
    "student", ["cifar:wrn_16_2", "cifar:vgg8", "cifar:ShuffleV1", "cifar:MobileNetV2"]
)
def test_M49_every_family_has_features(student):
    method = make_method(RKD, student=student).eval()
    images = F.interpolate(make_batch(torch.float32)[0], 32)
    with torch.no_grad():
        method(images, make_batch()[1])
        logits, features = method.student_with_features(images)
    torch.testing.assert_close(logits, method.student(images))
    assert features.shape[0] == BATCH
    assert features.dim() == 2
