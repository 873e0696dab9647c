"""`dfptkd plan`: every figure against what it foretells, and each formula against its absence."""

import functools
import json
import math
import time
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dfptkd.engine import plan as planning
from dfptkd.engine.cli import main, parse_run
from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.data.facts import DataFacts, data_facts
from dfptkd.engine.errors import DataError
from dfptkd.engine.memory import measure_growth
from dfptkd.engine.models import create_model
from dfptkd.engine.plan import ALLOCATOR, finish_time, make_plan
from dfptkd.engine.probe import Failed, Probe, Prober, build, run_probe
from dfptkd.engine.run_memory import LIBRARY_BYTES, Memory, MemoryModel, traced_twin
from dfptkd.engine.stand_in import pair_cost, stand_in
from dfptkd.recipes import cifar100, imagenet

CPU = torch.device("cpu")
PAIR = "cifar100.wrn_40_2_shufflenetv1"
SMALL = RunConfig(
    kernels="native",  # nothing is timed
    method="dfpt",
    student="cifar:resnet8_s2",
    teacher=TeacherConfig("cifar:resnet14_s2"),
    global_batch=32,
    eval_batch=32,
    epochs=2,
    device="cpu",
    data=DataConfig(name="synthetic", image_size=32, num_classes=10, limit=64),
)
OF_STUDENT = (
    "--data.name synthetic --data.image-size 16 --data.num-classes 4 --data.limit 24 "
    "--student cifar:resnet8_s2 --global-batch 8 --epochs 3 --device cpu"
).split()
TINY = [*OF_STUDENT, "--teacher.name", "cifar:resnet8_s2", "--teacher.weights", "x"]


@functools.cache
def model_of(config: RunConfig) -> MemoryModel:
    facts = data_facts(config.data)
    twin = stand_in(config, facts)
    return MemoryModel(config, facts, build(traced_twin(twin), CPU))


def memory_of(config: RunConfig, batch: int | None = None) -> Memory:
    return model_of(config).at(batch or config.global_batch)


# Growth ------------------------------------------------------------------------------------------


def test_growth_finds_the_moment_that_decides_at_each_size():
    """Few images: the parameters' part is the peak; many: the images' part is."""

    def call(images: int) -> None:
        activations = torch.empty(images * 1000, dtype=torch.uint8)
        del activations
        weights = torch.empty(50_000, dtype=torch.uint8)
        extra = torch.empty(images * 10, dtype=torch.uint8)
        del weights, extra

    growth = measure_growth(call, (2, 4), CPU)
    for images in (1, 8, 50, 51, 1000):
        assert growth.peak(images) == max(1000 * images, 50_000 + 10 * images)


def test_growth_of_a_call_that_chooses_by_size_falls_back_to_its_peaks():
    def call(images: int) -> None:
        held = [torch.empty(1000, dtype=torch.uint8) for _ in range(images)]
        del held

    assert measure_growth(call, (2, 4), CPU).peak(10) == 10_000


def test_a_silent_trace_leaves_standard_error_alone(capfd):
    measure_growth(lambda n: torch.ones(n).sum(), (1, 2), CPU)
    print("said", file=__import__("sys").stderr)
    assert capfd.readouterr().err == "said\n"


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "dfpt", "dfpt_plus"])
def test_a_step_of_another_size_holds_what_was_foretold(method):
    """Byte for byte, at eight times the traced sizes."""
    config = replace(SMALL, method=method)
    model = model_of(config)
    step = build(stand_in(config, data_facts(config.data)), CPU).step

    def call(images: int) -> None:
        batch = model.built.data.train.batch(torch.arange(images), seed=0, epoch=0)
        held = batch.clone()
        del batch
        step(held, 0)
        step.optimizer.zero_grad(set_to_none=True)

    traced = measure_growth(call, (31, 32), CPU).peak(32)
    assert model.at(32).step == pytest.approx(traced, rel=0.01)


@pytest.mark.parametrize(("method", "accumulate"), [("dfpt", 1), ("dfpt_plus", 4)])
def test_memory_is_within_10_percent_of_a_process_that_takes_the_steps(method, accumulate):
    config = replace(SMALL, method=method, global_batch=512, accumulate=accumulate)
    twin = stand_in(config, data_facts(config.data))
    name, _, value = ALLOCATOR.partition("=")
    probe = run_probe(twin, 512, 600, steps=2, span=0, environment={name: value})
    assert isinstance(probe, Probe), probe
    assert probe.batch == 512
    memory = memory_of(config, 512)
    assert memory.largest == "step"
    assert memory.peak == pytest.approx(probe.memory_bytes, rel=0.10)
    # What the comparison is worth: without what is kept it would not hold.
    assert memory.peak - memory.kept < 0.7 * probe.memory_bytes


def test_memory_grows_by_what_is_named():
    plain = memory_of(SMALL)
    averaged = memory_of(replace(SMALL, optim=OptimConfig(ema_decay=0.9)))
    student = model_of(SMALL).built.step.method.student
    student_bytes = sum(t.nbytes for t in student.state_dict().values())
    assert averaged.average == pytest.approx(student_bytes, rel=0.001)
    assert plain.average == 0
    trained = 4 * sum(p.numel() for p in model_of(SMALL).built.step.params)
    assert plain.parameters == plain.momentum == plain.gradients == trained
    assert memory_of(replace(SMALL, optim=OptimConfig(momentum=0))).momentum == 0
    assert memory_of(replace(SMALL, method="dfpt_plus")).parameters > plain.parameters


CRD = replace(SMALL, loss=LossConfig(crd=0.8, crd_negatives=100))


def test_M49_memory_of_crds_banks():
    """Of each training image two rows of 128 and a place; of those beyond the stand-in's, too."""
    model, plain = model_of(CRD), memory_of(SMALL)
    assert len(model.built.data.train) == 64
    width = 1024 + 8
    own = model.at(32)
    assert own.frozen - plain.frozen == pytest.approx(64 * width, abs=200)  # and first, count
    embeddings = 2 * (64 * 128 + 128) * 4
    assert own.saving - plain.saving == pytest.approx(2 * (64 * 1024 + 2 * embeddings), abs=100)
    facts = replace(data_facts(SMALL.data), train_images=50_064)
    large = MemoryModel(CRD, facts, model.built)
    more = large.at(32)
    assert more.frozen - own.frozen == 50_000 * width
    assert more.saving - own.saving == 2 * 50_000 * 1024
    assert more.step - own.step == 32 * 50_000 * 12
    assert more.kept - own.kept == 32 * 50_000 * 8


@pytest.mark.parametrize("images", [64, 40_000])
def test_M49_a_step_with_crd_holds_what_was_foretold(images):
    """Traced at all of the images, and out of a stand-in that has fewer."""
    config = replace(CRD, data=replace(SMALL.data, limit=images))
    facts = data_facts(config.data)
    model = model_of(config)
    few = MemoryModel(config, facts, model_of(CRD).built)
    step = build(stand_in(config, facts), CPU).step

    def call(count: int) -> None:
        step(step.data.train.batch(torch.arange(count), seed=0, epoch=0), 0)
        step.optimizer.zero_grad(set_to_none=True)

    traced = measure_growth(call, (31, 32), CPU).peak(32)
    assert model.at(32).step == pytest.approx(traced, rel=0.02)
    assert few.at(32).step == pytest.approx(traced, rel=0.05)
    assert few.at(32).kept == pytest.approx(model.at(32).kept, rel=0.02)


def test_memory_of_a_batch():
    one, two, four = (memory_of(SMALL, batch) for batch in (64, 128, 256))
    assert one.constant == two.constant == four.constant
    assert four.step - two.step == pytest.approx(2 * (two.step - one.step), rel=0.01)
    assert 0.8 * two.step < two.kept <= two.step
    parts = memory_of(replace(SMALL, global_batch=128, accumulate=4), 128)
    assert parts.kept == pytest.approx(two.kept / 4, rel=0.02)
    assert parts.step < 0.5 * two.step


def test_memory_counts_the_data_that_lies_on_the_device():
    config = replace(SMALL, data=DataConfig(name="cifar100"))
    memory = memory_of(config)
    images, logits = 60_000 * 3 * 32 * 32, 10_000 * 100 * 4
    assert memory.data == pytest.approx(images + logits, rel=0.02)
    assert memory.loading > images
    limited = memory_of(replace(SMALL, data=DataConfig(name="cifar100", limit=600)))
    assert limited.data == pytest.approx(600 * 2 * 3 * 32 * 32 + 600 * 400, rel=0.02)


def test_memory_counts_an_evaluation():
    """With few images a step, what an evaluation makes of its logits decides."""
    many = replace(SMALL, data=replace(SMALL.data, num_classes=1000, limit=None), global_batch=1)
    memory = memory_of(many)
    assert memory.largest == "evaluation"
    assert memory.evaluation > 2 * 10_000 * 1000 * 4
    assert memory_of(replace(many, method="ce")).evaluation < memory.evaluation / 2


def test_memory_counts_the_frozen_teacher_once():
    """What was loaded goes when the method has made its own of it."""
    dfpt, kd, ce = (memory_of(replace(SMALL, method=m)).frozen for m in ("dfpt", "kd", "ce"))
    teacher = create_model(SMALL.teacher.name, num_classes=SMALL.data.num_classes)
    size = sum(p.nbytes for p in teacher.parameters())
    assert kd - ce == pytest.approx(size, rel=0.05)
    assert dfpt == pytest.approx(kd, rel=0.1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_largest_batch_is_the_last_that_fits(accumulate):
    config = replace(SMALL, global_batch=24, accumulate=accumulate)
    model = model_of(config)
    budget = 800_000_000
    largest = model.largest_batch(budget)
    unit = math.lcm(8, accumulate)
    assert largest % unit == 0
    assert model.at(largest).need <= budget < model.at(largest + unit).need
    assert model.largest_batch(2 * budget) > 1.5 * largest
    assert model.largest_batch(LIBRARY_BYTES) == 0


# Disk, time, data --------------------------------------------------------------------------------


def test_disk_is_what_a_run_leaves(tmp_path, capsys):
    """`--max-steps` of a tiny run writes checkpoints of the foretold size."""
    args = [*OF_STUDENT, "--method", "ce", "--optim.ema-decay", "0.9", "--out-root", str(tmp_path)]
    plan = make_plan(parse_run("plan", ["quickstart", *args]))
    assert main(["train", "quickstart", *args]) == 0
    run = tmp_path / "quickstart-ce-seed0"
    states = list(run.glob("checkpoints/*/state.safetensors"))
    assert len(states) <= plan.disk.checkpoints
    for state in states:
        assert state.stat().st_size == pytest.approx(plan.disk.checkpoint, rel=0.05)
    student = (run / "student.safetensors").stat().st_size
    assert student == pytest.approx(plan.disk.student, rel=0.05)


def test_disk_counts_checkpoints_seeds_and_the_average():
    plain = make_plan(SMALL).disk
    assert plain.checkpoints == 2 + 1 + 1  # kept, best, being written
    assert plain.need == 4 * plain.checkpoint + plain.student
    more = make_plan(replace(SMALL, keep_checkpoints=7)).disk
    assert more.need - plain.need == 5 * plain.checkpoint
    seeds = make_plan(replace(SMALL, seeds=(0, 1, 2))).disk
    assert seeds.need == (3 * 3 + 1) * plain.checkpoint + 3 * plain.student
    averaged = make_plan(replace(SMALL, optim=OptimConfig(ema_decay=0.9))).disk
    assert averaged.need - 4 * averaged.checkpoint == 2 * plain.student
    assert averaged.checkpoint - plain.checkpoint == pytest.approx(plain.student, rel=0.01)
    plus = make_plan(replace(SMALL, method="dfpt_plus")).disk
    assert plus.checkpoint > plain.checkpoint


def test_hours_are_steps_and_evaluations_of_all_seeds():
    facts = DataFacts(1000, 100, 10, 32, True, "")
    config = replace(SMALL, global_batch=100, epochs=10, eval_every=3, seeds=(0, 1))
    probe = Probe(batch=50, steps=[0.9, 1.0, 5.0], evaluation=0.1, teacher=0.02)
    hours = finish_time(config, facts, 100, probe)
    assert hours.step_seconds == 2.0  # the median, scaled to the batch
    assert hours.evaluation_seconds == pytest.approx(10.0)
    assert hours.run_hours == pytest.approx((100 * 2.0 + 4 * 10.0 + 2.0) / 3600)
    assert hours.hours == pytest.approx(2 * hours.run_hours)


def test_number_of_images(tmp_path, monkeypatch):
    def counts(**data) -> tuple[int, int]:
        facts = data_facts(DataConfig(**data))
        return facts.train_images, facts.test_images

    assert counts(name="cifar10") == counts(name="cifar100") == (50_000, 10_000)
    assert counts(name="fashion_mnist", train_limit=1000) == (1000, 10_000)
    assert counts(name="cifar100", limit=500) == (500, 500)
    folder = {"name": "folder", "num_classes": 1000, "image_size": 8}
    assert counts(**folder) == (1_281_167, 50_000)
    with pytest.raises(DataError, match="absent"):  # what was named must be there
        counts(**folder, root=str(tmp_path / "absent"))
    monkeypatch.setenv("DFPTKD_DATA", str(tmp_path))  # holds another data set, or nothing
    assert counts(**folder) == (1_281_167, 50_000)
    for split, images in (("train", 3), ("val", 2)):
        for kind in ("a", "b"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (9, 9)).save(tmp_path / split / kind / f"{i}.png")
    assert counts(**folder, root=str(tmp_path)) == counts(**folder) == (6, 4)
    found = data_facts(DataConfig(**folder, root=str(tmp_path)))
    assert (found.num_classes, found.source) == (2, f"counted in {tmp_path}")
    monkeypatch.delenv("DFPTKD_DATA")
    with pytest.raises(DataError, match=r"expected --data\.root"):
        counts(name="folder", num_classes=50)


@pytest.mark.parametrize(
    ("config", "millions", "macs"),
    [
        # Reference 6 and 7: parameters of student, teacher, added; MACs of a step for one image
        (cifar100.wrn_40_2_shufflenetv1(), (0.949, 2.255, 0.058), 899e6),
        (cifar100.wrn_40_2_shufflenetv1("dfpt_plus"), (0.949, 2.255, 0.058), 1446e6),
        (cifar100.wrn_40_2_shufflenetv1("kd"), (0.949, 2.255, 0.0), 444e6),
        (imagenet.resnet34_resnet18(), (11.690, 21.798, 1.219), 15121e6),
    ],
)
def test_parameters_and_flops_are_those_of_the_tables(config, millions, macs):
    facts = data_facts(config.data)
    cost = pair_cost(config, facts.num_classes, (facts.image_size, facts.image_size))
    added = cost.teacher.added_params if config.has_prompt_path else 0
    counts = (cost.student_params, cost.teacher.teacher_params, added)
    assert [round(n / 1e6, 3) for n in counts] == pytest.approx(list(millions), abs=0.0011)
    assert cost.training_macs(config.method) == pytest.approx(macs, rel=0.001)


# Verdict and command -----------------------------------------------------------------------------


def plan_json(capsys, *args: str) -> tuple[int, dict]:
    code = main(["plan", "quickstart", *TINY, "--json", *args])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def test_plan_says_yes_and_writes_nothing(capsys, tmp_path):
    code, found = plan_json(capsys, "--out-root", str(tmp_path / "runs"))
    assert code == 0
    assert (found["fits"], found["verdict"], found["limits"]) == (True, "fits: yes", [])
    assert found["hours"] is None
    assert found["steps"] == 3 * 3  # 24 images, batch 8, 3 epochs
    assert found["disk"]["where"] == str(tmp_path)
    assert found["step_flops"] > 0
    assert found["largest_batch"] >= 8
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_no_and_which(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    code, found = plan_json(capsys)
    assert code == 5
    assert found["limits"] == ["disk"]
    assert found["verdict"].startswith("fits: no, disk: needs ")
    assert found["verdict"].endswith("has 1.0 kB")


def test_too_little_memory_says_no_and_which(capsys, monkeypatch):
    _, ample = plan_json(capsys)
    memory = ample["memory"]
    assert memory["need"] == memory["peak"] + memory["reserve"] > memory["peak"]
    short = memory["peak"] - 1_000_000  # a second trace may differ by some bytes
    monkeypatch.setattr(planning, "available_bytes", lambda _: short)
    code, found = plan_json(capsys)
    assert code == 5
    assert found["limits"] == ["memory"]
    assert found["largest_batch"] < 8
    assert not any(ALLOCATOR in note for note in found["notes"])
    monkeypatch.setattr(planning, "available_bytes", lambda _: short + 2_000_000)
    code, found = plan_json(capsys)  # room for what is in use, not for the reserve
    assert code == 5
    assert any(ALLOCATOR in note for note in found["notes"])
    assert not any(ALLOCATOR in note for note in ample["notes"])


def test_plan_prints_a_table(capsys):
    assert main(["plan", "quickstart", *TINY]) == 0
    printed = capsys.readouterr().out
    for words in ("parameters, added", "2 FLOP a MAC", "kept for the backward", "largest batch"):
        assert words in printed
    assert "--probe measures" in printed
    assert printed.splitlines()[-1] == "fits: yes"


def test_probe_gives_hours(capsys):
    code, found = plan_json(capsys, "--probe", "--seeds", "0,1", "--optim.ema-decay", "0.9")
    assert code == 0
    hours = found["hours"]
    assert hours["measured"]["batch"] == 8
    assert len(hours["measured"]["steps"]) >= 8
    assert hours["hours"] == pytest.approx(2 * hours["run_hours"])
    assert hours["run_hours"] * 3600 >= 9 * hours["step_seconds"]
    assert hours["evaluation_seconds"] > 0


def test_a_probe_ends_when_its_time_is_up():
    started = time.monotonic()
    failed = run_probe(stand_in(SMALL, data_facts(SMALL.data)), 32, 0.5)
    assert time.monotonic() - started < 5
    assert isinstance(failed, Failed)
    assert failed.reason == "not one step was done in 0 s" or "0.5 s" in failed.reason


def test_a_probe_that_breaks_says_why():
    twin = replace(stand_in(SMALL, data_facts(SMALL.data)), student="cifar:absent")
    failed = run_probe(twin, 32, 60)
    assert isinstance(failed, Failed)
    assert "absent" in failed.reason


@pytest.mark.parametrize(("seconds", "shrinks"), [(1000.0, False), (8.0, True)])
def test_a_slow_step_shrinks_the_batch(monkeypatch, seconds, shrinks):
    prober = Prober(stand_in(SMALL, data_facts(SMALL.data)), 512, time.time() + seconds, 8, 0)
    prober.built = build(prober.config, CPU)
    monkeypatch.setattr(prober, "clock", lambda call: 0.05 * 8)  # 50 ms an image
    batch = prober.choose_batch()
    assert batch == (pytest.approx(24, abs=8) if shrinks else 512)


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        ("plan", 2, "expected a recipe"),
        ("plan quickstrat", 2, "did you mean quickstart?"),
        ("plan quickstart --prob", 2, "unknown option --prob"),
        ("plan quickstart --global-batch 0", 2, "global_batch=0"),
        ("plan quickstart --device cpu --step.mode graph", 2, "CUDA graph"),
        ("plan quickstart --student cifar:absent", 2, "absent"),
        ("plan quickstart --data.name folder", 3, "--data.root"),
    ],
)
def test_bad_input_gets_one_line(args, code, word, capsys):
    assert main(args.split()) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert word in lines[0]


def test_help_names_the_exit_codes(capsys):
    assert main(["plan", "quickstart", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--probe" in printed
    assert "5: memory or disk" in printed
    assert "--global-batch" in printed
