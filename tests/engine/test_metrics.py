"""Means of an epoch, accuracies, and what an evaluation says of every path (M22, M47)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfptkd.engine.config import PromptConfig, RunConfig
from dfptkd.engine.data.source import ImageData, ResidentSplit
from dfptkd.engine.methods import StepOutput, build_method
from dfptkd.engine.metrics import (
    EpochMeter,
    Evaluator,
    accuracy,
    evaluate,
    hits,
    normaliser,
    path_divergence,
    predict,
)
from dfptkd.engine.models import create_model

CPU = torch.device("cpu")


def make_data(count=23, classes=10, size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator).byte()
    labels = torch.randint(0, classes, (count,), generator=generator)
    split = ResidentSplit(images, labels, augmentation=None)
    names = [str(i) for i in range(classes)]
    third = (0.5, 0.4, 0.3)
    return ImageData("made", split, split, classes, names, (size, size), third, (0.2, 0.2, 0.2))


def all_images(data):
    return normaliser(data)(data.test.batch(torch.arange(len(data.test)), seed=0, epoch=0))


# Means of an epoch --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9), st.floats(0, 9)), min_size=1))
def test_means_over_uneven_batches_are_means_over_images(steps):
    meter, images = EpochMeter(("ce", "kl"), CPU), sum(n for n, _, _ in steps)
    for n, ce, kl in steps:
        terms = {"kl": torch.tensor(kl), "ce": torch.tensor(ce)}  # by name, not by order
        meter.add(StepOutput(torch.tensor(ce + kl), terms, torch.tensor(n // 2)), n)
    row = meter.read(has_prompt_path=False)
    assert set(row) == {"loss/total", "loss/ce", "loss/kl", "train/student_top1"}
    for name, i in (("ce", 1), ("kl", 2)):
        expected = math.fsum(s[0] * s[i] for s in steps) / images
        assert row[f"loss/{name}"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert row["train/student_top1"] == 100 * sum(n // 2 for n, _, _ in steps) / images


def test_meter_counts_the_prompt_path_and_starts_anew():
    meter = EpochMeter(("ce",), CPU)
    for n, student, prompt in ((8, 3, 5), (3, 2, 1)):
        one = torch.tensor(1.0)
        meter.add(StepOutput(one, {"ce": one}, torch.tensor(student), torch.tensor(prompt)), n)
    row = meter.read(has_prompt_path=True)
    assert row["train/student_top1"] == pytest.approx(500 / 11)
    assert row["train/prompt_top1"] == pytest.approx(600 / 11)
    meter.reset()
    assert meter.read(has_prompt_path=True)["loss/total"] == 0.0


def test_counts_stay_exact_beyond_what_fp32_holds():
    meter = EpochMeter((), CPU)
    for n in (2**24, 1, 1, 1):
        meter.add(StepOutput(torch.tensor(0.0), {}, torch.tensor(n)), n)
    assert meter.sums[1] == 2**24 + 3
    assert meter.read(False)["train/student_top1"] == 100.0


def test_the_meter_keeps_no_graph():
    meter = EpochMeter(("ce",), CPU)
    loss = torch.tensor(1.0, requires_grad=True) * 2
    meter.add(StepOutput(loss, {"ce": loss.detach()}, torch.tensor(1)), 1)
    assert not meter.sums.requires_grad


# Accuracy -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 9), st.integers(0, 99))
def test_hits_are_labels_among_the_k_largest(rows, classes, k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(rows, classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    expected = sum(
        label in sorted(range(classes), key=lambda c, row=row: -row[c])[:k]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert hits(logits, labels, k).item() == expected


def test_accuracy_in_percent_with_fewer_than_five_classes():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0], [0.0, 9.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 2])) == (50.0, 100.0)
    many = torch.arange(6.0).expand(3, 6)
    assert accuracy(many, torch.tensor([5, 1, 0])) == pytest.approx((100 / 3, 200 / 3))


# Evaluation ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A classifier that remembers its batch sizes; BatchNorm tells train from eval mode."""

    def __init__(self, data):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * math.prod(data.image_size), data.num_classes)
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return self.fc(self.norm(images).flatten(1))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_every_image_counts_once(batch_size):
    data = make_data()
    model = Counting(data)
    with torch.no_grad():
        model(all_images(data))  # statistics that eval mode must use
    logits = model.eval()(all_images(data)).detach()
    model.train().seen.clear()
    result = evaluate(model, data, batch_size=batch_size)
    assert sum(model.seen) == 23
    assert max(model.seen) <= batch_size
    top1, top5 = accuracy(logits, data.test.labels)
    assert result == {"top1": top1, "top5": top5}
    assert 0 < top1 < top5 < 100
    predicted = predict(model.eval(), data, batch_size=batch_size)
    torch.testing.assert_close(predicted, logits, rtol=1e-4, atol=1e-5)
    assert not predicted.requires_grad


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_evaluation_leaves_training_flags_and_statistics_as_they_were(mode):
    data = make_data()
    model = Counting(data).train(mode != "eval")
    if mode == "mixed":
        model.norm.eval()  # frozen statistics inside a network in training
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, data, batch_size=5)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def make_method(name="dfpt"):
    torch.manual_seed(0)
    student = create_model("cifar:resnet8", num_classes=10)
    teacher = None if name == "ce" else create_model("cifar:resnet14", num_classes=10)
    config = RunConfig(method=name, prompt=PromptConfig(insert_stages=(1, 3)))
    return build_method(config, student, teacher)


@pytest.mark.parametrize("name", ["ce", "kd", "dfpt"])
@pytest.mark.parametrize("training", [True, False])
def test_the_evaluator_leaves_training_flags_as_they_were(name, training):
    method = make_method(name).train(training)
    method.student.bn1.eval()
    flags = {n: m.training for n, m in method.named_modules()}
    evaluator = Evaluator(method, make_data(), batch_size=8, workers=0)
    evaluator.teacher()
    assert {n: m.training for n, m in method.named_modules()} == flags
    evaluator()
    assert {n: m.training for n, m in method.named_modules()} == flags


def test_M22_M47_the_row_of_an_evaluation():
    data, method = make_data(), make_method()
    evaluator = Evaluator(method, data, batch_size=8, workers=0)
    teacher = evaluator.teacher()
    row = evaluator(ema=method.student)
    method.eval()
    images, labels = all_images(data), data.test.labels
    with torch.no_grad():
        paths = {
            "student": method.student(images),
            "prompt": method.prompt_logits(images),
            "teacher": method.teacher_logits(images),
        }
        x1 = method.teacher.original.stages[0](images)
        p1 = method.teacher.pairs["stage1"].prompt(x1)
    for path, logits in paths.items():
        assert (row[f"test/{path}_top1"], row[f"test/{path}_top5"]) == accuracy(logits, labels)
    assert row["test/ema_top1"] == row["test/student_top1"]
    assert teacher == {"top1": row["test/teacher_top1"], "top5": row["test/teacher_top5"]}
    assert row["prompt_norm/stage1"] == pytest.approx(
        (p1.flatten(1).norm(dim=1) / x1.flatten(1).norm(dim=1)).mean().item(), rel=1e-4
    )
    assert {k for k in row if k.startswith("prompt_norm/")} == {
        "prompt_norm/stage1", "prompt_norm/stage3",
    }  # fmt: skip
    for supervisor in ("teacher", "prompt"):
        q, p = (paths[n].double().div(4).log_softmax(1) for n in (supervisor, "student"))
        kl = (q.exp() * (q - p)).sum(1).mean().item()
        assert row[f"kl/{supervisor}_student"] == pytest.approx(kl, rel=1e-3)
        prob = q.exp()[torch.arange(23), labels].mean().item()
        assert row[f"prob/{supervisor}_target"] == pytest.approx(prob, rel=1e-4)


def test_a_method_without_teacher_says_nothing_of_one():
    evaluator = Evaluator(make_method("ce"), make_data(), batch_size=8, workers=0)
    assert evaluator.teacher() is None
    assert set(evaluator()) == {"test/student_top1", "test/student_top5"}
    kd = Evaluator(make_method("kd"), make_data(), batch_size=8, workers=0)
    kd.teacher()
    assert not any("prompt" in column for column in kd())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.floats(0.1, 30), st.sampled_from([1.0, 4.0]), st.integers(0, 99))
def test_M22_T6_the_logged_parts_sum_to_the_logged_divergence(classes, scale, tau, seed):
    generator = torch.Generator().manual_seed(seed)
    student, prompt, teacher = scale * torch.randn(3, 17, classes, generator=generator)
    labels = torch.randint(0, classes, (17,), generator=generator)
    teacher[0, labels[0]] = 1e4  # a sample that the teacher is certain of
    row = path_divergence(student, prompt, teacher, labels, tau)
    for supervisor in ("teacher", "prompt"):
        whole = row[f"kl/{supervisor}_student"]
        parts = [row[f"kl/{supervisor}_student_{part}"] for part in ("target", "nontarget")]
        assert sum(parts) == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert all(part > -1e-5 for part in parts)
        assert 0 <= row[f"prob/{supervisor}_target"] <= 1
    q, p = (z.double().div(tau).log_softmax(1) for z in (teacher, prompt))
    expected = (q.exp() * (q - p)).sum(1).mean().item()
    assert row["kl/teacher_prompt"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    without = path_divergence(student, None, teacher, labels, tau)
    assert without == {k: v for k, v in row.items() if "prompt" not in k}
