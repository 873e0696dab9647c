"""CRD in DFPT-KD: the loss, what is remembered of each image, and that runs go on with it (M49)."""

import dataclasses
import math

import pytest
import torch
from injectors import Kill, WholeSaves, differences, in_child, tiny_config, train, write_teacher

from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
)
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.errors import DataError
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.base import BankRows, Samples
from dfptkd.engine.methods.crd import MOMENTUM, TEMPERATURE, WIDTH, Contrast
from dfptkd.engine.methods.dfpt import TERMS
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep
from dfptkd.engine.train import run, run_seeds

CPU = torch.device("cpu")
CLASSES, SIZE, BATCH, IMAGES = 4, 16, 8, 48
CRD = LossConfig(crd=0.8, crd_negatives=20)


def make_contrast(widths=(6, 5), labels=None, negatives=7, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    labels = torch.arange(30) % 3 if labels is None else labels
    return Contrast(widths, labels, negatives, seed).to(dtype)


def make_inputs(contrast, rows=4, step=5):
    generator = torch.Generator().manual_seed(1)
    student, supervisor = (
        torch.randn(rows, e.in_features, generator=generator, dtype=torch.float64)
        for e in contrast.embeddings
    )
    indices = torch.randperm(len(contrast.by_class), generator=generator)[:rows]
    return student, supervisor, indices % 3, Samples(indices, torch.tensor(step))


# The loss -----------------------------------------------------------------------------------------


def written_out(contrast, student, supervisor, target, samples, *, swap=False, power=1.0):
    """The authors' loss, one image and one other at a time: P = exp(<v, bank> / T) / Z."""
    images, K = len(contrast.by_class), contrast.num_negatives
    Z = images * math.exp(1 / (2 * WIDTH * TEMPERATURE**2))
    others = contrast.draw(target, samples)
    banks = [contrast.supervisor_bank, contrast.student_bank]
    if swap:
        banks.reverse()
    total = 0.0
    for features, embed, bank in zip(
        (student, supervisor), contrast.embeddings, banks, strict=True
    ):
        for b in range(len(target)):
            v = embed.weight @ features[b] + embed.bias
            v = v / (v @ v).sqrt()

            def P(x, v=v, bank=bank):
                return (v @ bank[x] * power / TEMPERATURE).exp() / Z

            noise = K / images
            same = P(samples.indices[b])
            total = total - (same / (same + noise)).log()
            for x in others[b]:
                total = total - (noise / (P(x) + noise)).log()
    return total / len(target)


def test_M49_crd_is_the_authors_loss():
    contrast = make_contrast()
    inputs = make_inputs(contrast)
    loss, _ = contrast(*inputs)
    torch.testing.assert_close(loss, written_out(contrast, *inputs), rtol=1e-10, atol=0)
    loss.backward()
    found = [p.grad.clone() for p in contrast.parameters()]
    contrast.zero_grad()
    written_out(contrast, *inputs).backward()
    expected = [p.grad for p in contrast.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_M49_crd_control_swapped_banks_or_another_exponent_show():
    contrast = make_contrast()
    inputs = make_inputs(contrast)
    loss, _ = contrast(*inputs)
    for wrong in ({"swap": True}, {"power": 0.9}):
        assert not torch.allclose(loss, written_out(contrast, *inputs, **wrong), rtol=1e-3)


def test_M49_crd_gradient_is_right():
    contrast = make_contrast()
    student, supervisor, *rest = make_inputs(contrast)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: contrast(s, supervisor, *rest)[0], [student])


def test_M49_crd_normalises_by_what_the_first_batch_is_expected_to_say():
    """Of banks as they start: the authors' estimate is the mean of exp(<v, bank> / T), times N."""
    contrast = make_contrast(labels=torch.arange(50_000) % 100)
    v = torch.nn.functional.normalize(torch.randn(64, WIDTH, dtype=torch.float64), dim=1)
    estimate = (v @ contrast.supervisor_bank.T / TEMPERATURE).exp().mean()
    assert estimate.item() == pytest.approx(math.exp(1 / (2 * WIDTH * TEMPERATURE**2)), rel=0.02)
    norms = contrast.student_bank.norm(dim=1)
    assert norms.mean().item() == pytest.approx(1, rel=0.01)


def test_M49_crd_of_extreme_features_is_finite():
    contrast = make_contrast(dtype=torch.float32)
    student, supervisor, *rest = make_inputs(contrast)
    for scale in (0.0, 1e-30, 1e30):
        features = (scale * student).float().requires_grad_()
        loss, rows = contrast(features, supervisor.float(), *rest)
        loss.backward()
        assert loss.isfinite()
        assert features.grad.isfinite().all()
        assert all(r.isfinite().all() for r in rows[1:])


# The others ---------------------------------------------------------------------------------------


def test_M49_crd_draws_every_image_of_another_class_alike():
    labels = torch.tensor([0] * 5 + [2] * 3 + [1] * 4 + [0] * 2)
    contrast = make_contrast(labels=labels, negatives=40_000)
    indices = torch.tensor([0, 6, 9])
    drawn = contrast.draw(labels[indices], Samples(indices, torch.tensor(3)))
    for image, row in zip(indices.tolist(), drawn, strict=True):
        counts = row.bincount(minlength=len(labels))
        other = labels != labels[image]
        assert (counts[~other] == 0).all()
        expected = 40_000 / int(other.sum())
        assert ((counts[other] - expected).abs() < 5 * expected**0.5).all()


def test_M49_crd_draws_by_seed_step_and_image_alone():
    contrast, other_seed = make_contrast(), make_contrast(seed=1)
    _, _, target, samples = make_inputs(contrast)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = contrast.draw(target, samples)
    assert torch.equal(torch.get_rng_state(), before)
    part = Samples(samples.indices[2:], samples.step)
    assert torch.equal(contrast.draw(target[2:], part), drawn[2:])
    later = samples._replace(step=samples.step + 1)
    for changed in (contrast.draw(target, later), other_seed.draw(target, samples)):
        assert not torch.equal(changed, drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn)


def test_M49_crd_without_another_class_is_refused():
    with pytest.raises(DataError, match="two classes at least"):
        make_contrast(labels=torch.zeros(4, dtype=torch.int64))


# The banks ----------------------------------------------------------------------------------------


def test_M49_crd_remembers_a_moving_average_of_length_1():
    contrast = make_contrast()
    student, supervisor, target, samples = make_inputs(contrast)
    before = [bank.clone() for bank in contrast.banks]
    _, rows = contrast(student, supervisor, target, samples)
    assert all(torch.equal(a, b) for a, b in zip(before, contrast.banks, strict=True))
    contrast.remember(rows, torch.tensor(True))
    rest = torch.ones(30, dtype=torch.bool)
    rest[samples.indices] = False
    for features, embed, old, bank in zip(
        (student, supervisor), contrast.embeddings, before, contrast.banks, strict=True
    ):
        assert torch.equal(bank[rest], old[rest])
        for x, image in zip(features, samples.indices, strict=True):
            v = embed(x).detach()
            mixed = MOMENTUM * old[image] + (1 - MOMENTUM) * v / v.norm()
            torch.testing.assert_close(bank[image], mixed / mixed.norm())
    assert not any(r.requires_grad for r in rows)


def test_M49_crd_forgets_a_step_that_does_not_pass():
    contrast = make_contrast()
    before = [bank.clone() for bank in contrast.banks]
    rows = BankRows(torch.tensor([3, 4]), *torch.full((2, 2, WIDTH), math.nan).double())
    contrast.remember(rows, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, contrast.banks, strict=True))


def test_M49_crd_of_an_image_that_is_there_twice_keeps_the_last_rows():
    contrast = make_contrast()
    values = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    contrast.remember(BankRows(torch.tensor([3, 8, 3, 5]), *values), torch.tensor(True))
    for bank, new in zip(contrast.banks, values, strict=True):
        assert torch.equal(bank[[8, 3, 5]], new[1:])


# In steps and runs --------------------------------------------------------------------------------


def make_step(loss=CRD, method="dfpt", eval_mode=False, **changes):
    data_config = DataConfig(
        name="synthetic", num_classes=CLASSES, image_size=SIZE, limit=IMAGES, crop_padding=2
    )
    data = load_data(data_config, CPU)
    config = RunConfig(
        method=method, loss=loss, data=data_config, global_batch=BATCH, device="cpu",
        teacher=TeacherConfig(fold_bn=False), kernels="native", **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    student = create_model("cifar:resnet8", num_classes=CLASSES)
    torch.manual_seed(1)
    teacher = create_model("cifar:resnet14", num_classes=CLASSES)
    torch.manual_seed(2)
    made = build_method(config, student, teacher, data.train.labels).train(not eval_mode)
    return TrainStep(made, config, data, total_steps=10, steps_per_epoch=6, device=CPU)


def walk(step, count=3, change=lambda batch: batch):
    batches = train_batches(step.data.train, batch_size=BATCH, seed=3, epoch=0)
    for i, batch in zip(range(count), batches, strict=False):
        step(change(batch), i)
    return {k: v.clone() for k, v in step.method.trained_state().items()}


@pytest.mark.parametrize("name", ["dfpt", "dfpt_plus"])
def test_M49_crd_is_a_term_that_trains_student_and_embeddings(name):
    step = make_step(method=name)
    method = step.method
    before = {k: v.clone() for k, v in method.trained_state().items()}
    groups = {g["name"]: g["params"] for g in method.parameter_groups(OptimConfig())}
    assert len(groups.pop("embeddings")) == 4
    assert method.term_names == (*TERMS, "crd")
    after = walk(step, 1)
    assert after.keys() == before.keys()
    for key in ("crd.embeddings.0.weight", "crd.embeddings.1.weight", "crd.student_bank"):
        assert not torch.equal(after[key], before[key]), key
    changed = (after["crd.supervisor_bank"] != before["crd.supervisor_bank"]).any(dim=1)
    batch = next(iter(train_batches(step.data.train, batch_size=BATCH, seed=3, epoch=0)))
    assert set(changed.nonzero().flatten().tolist()) == set(batch.indices.tolist())
    assert step.meter.read(True)["loss/crd"] > 0
    # The prompt path's walk is that of the plain method: the features are detached.
    plain = walk(make_step(LossConfig(prompt_student=0.0), method=name), 2)
    ours = walk(make_step(dataclasses.replace(CRD, prompt_student=0.0), method=name), 2)
    for key in plain:
        if "num_batches" not in key:
            assert torch.equal(plain[key], ours[key]) == (key.startswith("prompt.")), key


def test_M49_crd_does_not_depend_on_how_a_batch_is_cut():
    """In fp64, where rounding flips no ReLU."""

    def walk_in_fp64(loss=CRD, **changes):
        torch.set_default_dtype(torch.float64)
        try:
            step = make_step(loss, eval_mode=True, **changes)
        finally:
            torch.set_default_dtype(torch.float32)
        normalise = step.normalise
        step.normalise = lambda batch: normalise(batch).double()
        return walk(step)

    whole, parts = (walk_in_fp64(accumulate=n) for n in (1, 4))
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)
    control = walk_in_fp64(dataclasses.replace(CRD, crd=0.79))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(whole, control, rtol=1e-6, atol=1e-8)


def test_M49_crd_a_bad_step_leaves_everything():
    step = make_step()
    before = walk(step, 1)
    normalise = step.normalise
    step.normalise = lambda batch: normalise(batch) * math.nan
    step(next(iter(train_batches(step.data.train, batch_size=BATCH, seed=3, epoch=1))), 1)
    assert step.gate.skipped == 1
    after = step.method.trained_state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_M49_crd_alternating_moves_the_embeddings_with_the_student():
    step = make_step(dataclasses.replace(CRD, update="alternating"))
    batches = train_batches(step.data.train, batch_size=BATCH, seed=3, epoch=0)
    before = {k: v.clone() for k, v in step.method.trained_state().items()}
    for i, batch in zip(range(2), batches, strict=False):
        step(batch, i)
        after = {k: v.clone() for k, v in step.method.trained_state().items()}
        for key in ("student.fc.weight", "crd.embeddings.1.weight"):
            assert torch.equal(before[key], after[key]) == (i == 1), key
        before = after


def test_M49_crd_certificate_and_examination_move_nothing():
    step = make_step()
    batch = next(iter(train_batches(step.data.train, batch_size=BATCH, seed=3, epoch=0)))
    before = {k: v.clone() for k, v in step.method.trained_state().items()}
    step.choose_kernels(batch)
    certificates = [c.certificate for c in step.kernels.table.values()]
    assert all(certificate is None or certificate.holds for certificate in certificates)
    terms = step.examine(batch)
    assert terms.keys() == {"total", *TERMS, "crd"}
    after = step.method.trained_state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_M49_crd_compiled_steps_follow_eager_ones(monkeypatch):
    monkeypatch.setattr(
        TrainStep, "_compile",
        lambda step: step.method.compile_regions(
            fullgraph=True, dynamic=False, backend="aot_eager"
        ),
    )  # fmt: skip
    loss = dataclasses.replace(CRD, rkd_distance=25.0, rkd_angle=50.0, decoupled=True)
    optim = OptimConfig(lr=1e-3)  # steps so small that rounding does not grow
    eager, compiled = (
        walk(make_step(loss, optim=optim, step=StepConfig(mode=mode)))
        for mode in ("eager", "compile")
    )
    torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-5)


def crd_config(out, **changes):
    config = tiny_config(out, "dfpt", loss=CRD)
    return dataclasses.replace(config, **changes)


def test_M49_crd_a_run_that_is_killed_within_an_epoch_ends_where_it_would_have(tmp_path):
    write_teacher(tmp_path)
    whole = crd_config(tmp_path / "whole", checkpoint_steps=1)
    killed = crd_config(tmp_path / "killed", checkpoint_steps=1)
    assert in_child(train, whole, folder=tmp_path).code == 0
    for step in (3, 6):
        ended = in_child(train, killed, WholeSaves(), Kill(step, "after"), folder=tmp_path)
        assert ended.code == -9, ended.output
    assert in_child(train, killed, folder=tmp_path).code == 0
    assert differences(tmp_path / "whole", tmp_path / "killed", 8) == []
    saved = load_checkpoint(tmp_path / "killed/checkpoints/step-8").tensors
    assert {k for k in saved if k.startswith("crd.")} == {
        "crd.student_bank", "crd.supervisor_bank",
        *(f"crd.embeddings.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")),
    }  # fmt: skip


def test_M49_crd_control_a_bank_that_is_not_restored_shows(tmp_path, monkeypatch):
    write_teacher(tmp_path)
    whole, killed = (crd_config(tmp_path / n, checkpoint_steps=1) for n in ("whole", "killed"))
    assert in_child(train, whole, folder=tmp_path).code == 0
    ended = in_child(train, killed, WholeSaves(), Kill(6, "after"), folder=tmp_path)
    assert ended.code == -9
    monkeypatch.setattr(Contrast, "load_state_dict", lambda *_: None)
    run(killed)
    assert "tensor student.conv1.weight" in differences(tmp_path / "whole", tmp_path / "killed", 8)


def test_M49_crd_each_of_several_seeds_has_the_bits_of_its_own_run(tmp_path):
    write_teacher(tmp_path)
    config = crd_config(tmp_path / "x", data=DataConfig(
        name="synthetic", image_size=16, num_classes=4, limit=64, order_seed=7
    ))  # fmt: skip
    alone = [
        run(dataclasses.replace(config, seed=s, out=str(tmp_path / f"alone{s}"))).out
        for s in (0, 3)
    ]
    together = dataclasses.replace(config, out=None, out_root=str(tmp_path / "t"), seeds=(0, 3))
    ends = [
        [load_checkpoint(out / "checkpoints/step-8").tensors for out in outs]
        for outs in (alone, [result.out for result in run_seeds(together)])
    ]
    for own, shared in zip(*ends, strict=True):
        assert own.keys() == shared.keys()
        assert all(torch.equal(own[k], shared[k]) for k in own)
    assert not torch.equal(ends[0][0]["crd.student_bank"], ends[0][1]["crd.student_bank"])


def test_M49_crd_is_state_of_its_own_runs_alone(tmp_path):
    """A checkpoint with banks is none of a run without them, and the other way round."""
    write_teacher(tmp_path)
    configs = [make(tmp_path / "a") for make in (crd_config, lambda out: tiny_config(out, "dfpt"))]
    for here, there in (configs, configs[::-1]):
        here, there = (
            dataclasses.replace(config, out=str(tmp_path / f"{config.loss.crd}"), max_steps=2)
            for config in (here, there)
        )
        run(here)
        with pytest.raises(DataError, match=rf"loss\.crd: {here.loss.crd} there"):
            run(dataclasses.replace(there, resume=str(tmp_path / f"{here.loss.crd}")))
