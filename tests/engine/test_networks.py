"""Any classifier as student and teacher: it trains, or is refused in one line before anything is
trained; train, plan and profile agree."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dfptkd.engine import profile as profiling
from dfptkd.engine import stand_in
from dfptkd.engine import train as train_module
from dfptkd.engine.alarms import overhead_warnings
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, LossConfig, RunConfig, TeacherConfig
from dfptkd.engine.data import epoch_rows, load_data
from dfptkd.engine.distributed import World
from dfptkd.engine.errors import DataError
from dfptkd.engine.machine import demand_of
from dfptkd.engine.models import create_model
from dfptkd.engine.train import run

UNCUT = "torchvision:mobilenet_v3_small"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Random weights of a teacher that nobody knows how to cut."""
    path = tmp_path_factory.mktemp("weights") / "uncut.safetensors"
    torch.manual_seed(0)
    save_file(create_model(UNCUT, num_classes=4).state_dict(), path)
    return str(path)


def make_config(root: Path, method: str = "kd", **changes) -> RunConfig:
    """A step of 8 synthetic images."""
    config = RunConfig(
        method=method,
        student="cifar:resnet8_s2",
        epochs=1,
        global_batch=8,
        eval_batch=16,
        device="cpu",
        kernels="reference",
        out_root=str(root),
        data=DataConfig(name="synthetic", image_size=32, num_classes=4, limit=8),
    )
    return replace(config, **changes)


@pytest.mark.parametrize("method", ["kd", "dkd", "dist", "mixture"])
def test_methods_without_prompt_blocks_take_any_teacher(tmp_path, weights, method):
    loss = LossConfig(mixture_control=method == "mixture")
    config = make_config(tmp_path, "dfpt" if method == "mixture" else method, loss=loss)
    teacher = TeacherConfig(name=UNCUT, weights=weights)
    result = run(replace(config, teacher=teacher))
    record = json.loads((result.out / "run.json").read_text())
    cost = record["cost"]
    network = create_model(UNCUT, num_classes=4)
    assert cost["teacher_params"] == sum(p.numel() for p in network.parameters())
    assert cost["train_macs_per_image"] == cost["teacher_macs"] + 3 * cost["student_macs"] > 0
    assert not [name for name in cost if name.startswith(("added", "new_head"))]
    # What was distilled is what the network itself says.
    network.load_state_dict(load_file(weights))
    data = load_data(config.data, CPU)
    images = data.test.batch(torch.arange(8), seed=0, epoch=0)
    pixels = images.images.float().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = network.eval()((pixels - mean) / std)
    right = (logits.argmax(1) == images.labels).float().mean().item()
    assert record["teacher"]["top1"] == pytest.approx(100 * right)


def test_a_checked_run_has_the_bits_of_one_that_was_not_checked(tmp_path, monkeypatch):
    """Of a student with BatchNorms and dropout."""

    def with_dropout(name, **options):
        return nn.Sequential(nn.Dropout(0.2), create_model(name, **options))

    monkeypatch.setattr(train_module, "create_model", with_dropout)
    config = make_config(tmp_path, "ce")
    found = [load_file(run(config).out / "student.safetensors")]
    monkeypatch.setattr(train_module, "check_student", lambda *_: None)
    unchecked = run(replace(config, out=str(tmp_path / "unchecked")))
    found.append(load_file(unchecked.out / "student.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


TINY = (
    "quickstart --device cpu --data.name synthetic --data.image-size 32 --data.num-classes 4 "
    "--data.limit 16 --global-batch 8 --epochs 1 --student cifar:resnet8_s2 "
    "--teacher.name cifar:resnet8_s2"
).split()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--student", UNCUT, "--accumulate", "8"],
            f"student {UNCUT} cannot be trained on parts of 1",
        ),
        (
            ["--teacher.name", "timm:vit_tiny_patch16_224"],
            "teacher timm:vit_tiny_patch16_224 cannot be evaluated on batches of 8 images of 32",
        ),
        (["--teacher.name", UNCUT], "MobileNetV3 has no known stages"),
    ],
)
def test_train_plan_and_profile_refuse_alike_before_anything_is_trained(
    tmp_path, capsys, options, words
):
    args = [*TINY, *options, "--out-root", str(tmp_path)]
    said = []
    for verb in ("train", "plan", "profile"):
        assert main([verb, *args]) == 2
        said.append(one_line(capsys))
    assert words in said[0]
    assert said == said[:1] * 3
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--student", "cifar:resnet9"], 2),
        (["--student-weights", "absent.safetensors"], 3),
    ],
)
def test_a_wrong_student_is_refused_before_its_teacher_is_trained(tmp_path, capsys, options, code):
    assert main(["train", *TINY, *options, "--out-root", str(tmp_path)]) == code
    assert options[1].removeprefix("cifar:") in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_data_that_is_missing_is_left_to_the_run(tmp_path, monkeypatch):
    """It says what is missing; here nothing is checked."""
    monkeypatch.setattr(stand_in, "check_networks", lambda *_: pytest.fail("checked"))
    data = DataConfig(name="folder", root=str(tmp_path / "absent"))
    stand_in.check_before_teacher(make_config(tmp_path, data=data), World())
    with pytest.raises(DataError, match="absent"):
        run(make_config(tmp_path, data=data))


def test_profile_of_kd_leaves_out_what_the_teacher_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "affordable_batch", lambda *_: 4)
    config = make_config(tmp_path, teacher=TeacherConfig(name=UNCUT))
    setting, notes = profiling.make_setting(config, CPU, rounds=1)
    assert profiling.compared(setting.config, setting.left_out) == ["ce", "kd"]
    for method in ("dfpt", "dfpt_plus"):
        assert any(n.startswith(f"without {method}: MobileNetV3 has no known") for n in notes)
    assert profiling.overhead(setting.cost.teacher, []) == []
    assert overhead_warnings(setting.cost.teacher.record()) == []


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("train", "test"), [(48, 12), (100, 25), (30, 7), (12, 33), (6, 3)])
def test_the_smallest_parts_are_those_of_the_loader(processes, accumulate, train, test):
    batch, eval_batch = 24, 5
    config = RunConfig(global_batch=batch, accumulate=accumulate, eval_batch=eval_batch)
    data = DataConfig(name="synthetic", image_size=4, num_classes=3, limit=max(train, test))
    splits = load_data(data, CPU)
    splits.train.labels, splits.test.labels = splits.train.labels[:train], splits.test.labels[:test]
    trained, evaluated = set(), set()
    for rank in range(processes):
        shard = (rank, processes)
        for rows in epoch_rows(splits.train, batch_size=batch, seed=0, epoch=0, shard=shard):
            trained |= {len(part) for part in rows.chunk(accumulate)}
        block = torch.arange(test).tensor_split(processes)[rank]
        evaluated |= {len(rows) for rows in block.split(eval_batch)}
    found = demand_of(config, splits, World(0, processes))
    if train % processes == 0 or train >= batch:  # others are refused
        assert found.part == min(trained)
    assert found.evaluated == min(evaluated)
    assert found.image_size == (4, 4)
