"""What a finished run hands over: the student and the average of its weights, evaluated, exported
and used as teachers; equal files of equal runs, readable by whom the umask lets."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfptkd.engine import files
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.data import load_data
from dfptkd.engine.errors import DataError
from dfptkd.engine.eval_checkpoint import evaluate_checkpoint
from dfptkd.engine.export import export_student
from dfptkd.engine.identity import fingerprint
from dfptkd.engine.models import create_model
from dfptkd.engine.teacher import teacher_run
from dfptkd.engine.train import run

STUDENT = "cifar:resnet8_s2"


def config_of(root: Path, **changes) -> RunConfig:
    """Three steps in two epochs, with an average that moves far enough to differ."""
    config = RunConfig(
        recipe="tiny",
        method="ce",
        student=STUDENT,
        epochs=2,
        global_batch=8,
        eval_batch=64,
        device="cpu",
        kernels="reference",
        deterministic=True,
        out_root=str(root),
        data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=24),
        teacher=TeacherConfig(name=STUDENT, epochs=1, global_batch=8),
        optim=OptimConfig(lr=0.05, milestones=(), ema_decay=0.5),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two equal runs, a teacher with its average, and a run without one."""
    root = tmp_path_factory.mktemp("runs")
    before = os.umask(0o027)
    try:
        for name in ("a", "b"):
            run(config_of(root, out=str(root / name)))
        export_student(root / "a", formats=("safetensors",), say=lambda _: None)
    finally:
        os.umask(before)
    run(replace(teacher_run(config_of(root)), out=str(root / "teacher")))
    run(config_of(root, out=str(root / "plain"), optim=OptimConfig(lr=0.05, milestones=())))
    return root


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def accuracy(weights: dict[str, torch.Tensor]) -> float:
    """Of the network on the test images in percent, counted here image by image."""
    data = load_data(config_of(Path("x")).data, torch.device("cpu"))
    model = create_model(STUDENT, num_classes=4)
    model.load_state_dict(weights)
    model.eval()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    hits = 0
    for i in range(len(data.test)):
        batch = data.test.batch(torch.tensor([i]), seed=0, epoch=0, side=None)
        pixels = batch.images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            hits += int(model((pixels - mean) / std).argmax() == batch.labels[0])
    return 100 * hits / len(data.test)


def test_the_average_is_written_beside_the_student(root):
    found = load_file(root / "a/student_ema.safetensors")
    state = load_checkpoint(root / "a/checkpoints/step-6").tensors
    student = load_file(root / "a/student.safetensors")
    assert found.keys() == student.keys()
    assert all(torch.equal(found[k], state[f"ema.module.{k}"]) for k in found)
    assert not torch.equal(found["conv1.weight"], student["conv1.weight"])
    last = json.loads((root / "a/status.json").read_text())["last"]
    said = metadata(root / "a/student_ema.safetensors")
    assert said.items() >= {"model": STUDENT, "num_classes": "4", "weights": "ema"}.items()
    assert float(said["top1"]) == last["ema_top1"]
    assert "weights" not in metadata(root / "a/student.safetensors")
    assert not (root / "plain/student_ema.safetensors").exists()
    assert (root / "teacher/teacher_ema.safetensors").is_file()


@pytest.mark.parametrize("place", ["a", "a/checkpoints/step-6"])
@pytest.mark.parametrize("ema", [False, True])
def test_either_is_evaluated(root, place, ema):
    name = "student_ema" if ema else "student"
    expected = accuracy(load_file(root / f"a/{name}.safetensors"))
    found = evaluate_checkpoint(root / place, device="cpu", ema=ema)
    assert found.top1 == pytest.approx(expected)
    assert found.logged == pytest.approx(expected, abs=1e-3)
    assert found.weights == ("EMA" if ema else "raw")


def test_the_command_line_says_which(root, capsys):
    assert main(["eval", str(root / "a"), "--ema", "--device", "cpu"]) == 0
    assert f"{STUDENT} (EMA weights): top-1" in capsys.readouterr().out
    assert main(["eval", str(root / "a/student_ema.safetensors"), "--device", "cpu"]) == 0
    assert f"{STUDENT} (EMA weights): top-1" in capsys.readouterr().out
    assert main(["eval", str(root / "plain"), "--device", "cpu"]) == 0
    assert f"{STUDENT}: top-1" in capsys.readouterr().out


def test_either_is_exported(root, tmp_path, capsys):
    options = ["--formats", "safetensors", "--out", str(tmp_path)]
    assert main(["export", str(root / "a"), *options]) == 0
    assert "these are the raw weights; --ema takes their EMA" in capsys.readouterr().out
    assert main(["export", str(root / "a"), "--ema", *options]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "student.safetensors", "student_ema.safetensors",
    ]  # fmt: skip
    for name in ("student", "student_ema"):
        exported = load_file(tmp_path / f"{name}.safetensors")
        own = load_file(root / f"a/{name}.safetensors")
        assert all(torch.equal(exported[k], v) for k, v in own.items())
    assert metadata(tmp_path / "student_ema.safetensors")["weights"] == "ema"


def test_a_run_from_before_averages_had_a_file_has_it_in_its_checkpoint(root, tmp_path):
    shutil.copytree(root / "a", tmp_path / "old")
    (tmp_path / "old/student_ema.safetensors").unlink()
    (path,) = export_student(
        tmp_path / "old", tmp_path, formats=("safetensors",), ema=True, say=lambda _: None
    )
    own = load_file(root / "a/student_ema.safetensors")
    assert all(torch.equal(load_file(path)[k], v) for k, v in own.items())


@pytest.mark.parametrize("place", ["plain", "plain/checkpoints/step-6"])
def test_no_average_is_one_line(root, place, capsys):
    for verb in ("eval", "export"):
        assert main([verb, str(root / place), "--ema"]) == 3
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "no EMA of the weights: expected a run with --optim.ema-decay" in said


@pytest.mark.parametrize("ema", ["auto", "no", "yes"])
def test_either_is_a_teacher(root, tmp_path, capsys, ema):
    weights = str(root / "teacher/teacher.safetensors")
    config = config_of(tmp_path, method="kd", epochs=1, max_steps=1, out=str(tmp_path / "kd"))
    run(replace(config, teacher=replace(config.teacher, weights=weights, ema=ema)))
    said = capsys.readouterr().out
    file = "teacher_ema" if ema == "yes" else "teacher"
    model = create_model(STUDENT, num_classes=4)
    model.load_state_dict(load_file(root / f"teacher/{file}.safetensors"))
    record = json.loads((tmp_path / "kd/run.json").read_text())["teacher"]
    assert record["sha256"] == fingerprint(model)
    used = "the EMA are used" if ema == "yes" else "the raw ones are used"
    assert said.count(used) == 1
    assert "'teacher_ema.safetensors'" in said


def test_a_teacher_without_an_average_is_refused_where_one_is_asked_for(root, tmp_path, capsys):
    config = tmp_path / "run.json"
    values = json.loads((root / "plain/run.json").read_text())["config"]
    config.write_text(json.dumps(values | {"method": "kd", "out": str(tmp_path / "kd")}))
    weights = str(root / "plain/student.safetensors")
    args = ["--teacher.weights", weights, "--teacher.ema", "yes"]
    assert main(["train", "--config", str(config), *args]) == 3
    said = capsys.readouterr().err
    assert f"{weights}: holds no EMA of the weights" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_the_weights_file_of_a_run_stands_for_the_run(root, tmp_path, verb, capsys):
    out = ["--out", str(tmp_path / "o"), "--formats", "safetensors"] if verb == "export" else []
    state = root / "a/checkpoints/step-6/state.safetensors"
    for path in (root / "a/student.safetensors", root / "teacher/teacher.safetensors", state):
        assert main([verb, str(path), *out]) == 0, path
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
    capsys.readouterr()


def test_the_file_of_the_average_stands_for_the_average(root, tmp_path, capsys):
    path = root / "a/student_ema.safetensors"
    out = ["--out", str(tmp_path), "--formats", "safetensors"]
    assert main(["export", str(path), *out]) == 0
    assert "raw weights" not in capsys.readouterr().out
    exported = load_file(tmp_path / "student_ema.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in load_file(path).items())


def test_another_file_is_no_run(root, tmp_path, capsys):
    shutil.copy(root / "a/student.safetensors", tmp_path / "student.safetensors")
    assert main(["export", str(tmp_path / "student.safetensors")]) == 3
    said = capsys.readouterr().err
    assert "expected a run's folder, or checkpoints/step-N in one" in said


def test_a_student_with_a_nan_is_named(root, tmp_path, capsys):
    shutil.copytree(root / "a", tmp_path / "a")
    path = tmp_path / "a/student.safetensors"
    tensors = load_file(path)
    tensors["fc.bias"][1] = float("nan")
    save_file(tensors, path)
    for verb in ("eval", "export"):
        assert main([verb, str(tmp_path / "a")]) == 3
        said = capsys.readouterr().err
        assert f"{path} ({STUDENT}): fc.bias: 1 of 4 values are NaN" in said


@pytest.mark.parametrize("option", ["--teacher.weights", "--student-weights"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layer1.0.conv1.weight", float("nan"), "values are NaN or infinite"),
        ("bn1.running_var", -1.0, "a variance of -1, expected 0 or more"),
    ],
)
def test_a_run_refuses_such_weights_before_it_starts(root, tmp_path, capsys, option, key, value,
                                                     reason):  # fmt: skip
    tensors = load_file(root / "teacher/teacher.safetensors")
    tensors[key].view(-1)[0] = value
    torch.save({"model": tensors}, tmp_path / "w.pth")
    values = json.loads((root / "plain/run.json").read_text())["config"]
    config = values | {"method": "kd", "out": str(tmp_path / "kd")}
    config["teacher"]["weights"] = str(root / "teacher/teacher.safetensors")
    (tmp_path / "run.json").write_text(json.dumps(config))
    args = ["train", "--config", str(tmp_path / "run.json"), option, str(tmp_path / "w.pth")]
    assert main(args) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'w.pth'}: {key}: " in said
    assert reason in said
    assert not (tmp_path / "kd/metrics.csv").exists()


# Bytes and modes ---------------------------------------------------------------------------------


def test_equal_runs_give_equal_files(root, tmp_path):
    for name in ("student.safetensors", "student_ema.safetensors",
                 "checkpoints/step-6/state.safetensors"):  # fmt: skip
        assert sha256(root / "a" / name) == sha256(root / "b" / name), name
    for ema in (False, True):
        exports = []
        for name in ("a", "b"):
            out = tmp_path / f"{name}{ema}"
            (path,) = export_student(
                root / name, out, formats=("safetensors",), ema=ema, say=lambda _: None
            )
            exports.append(sha256(path))
        assert exports[0] == exports[1]


def test_control_the_library_orders_metadata_by_chance(root, tmp_path):
    tensors = {"w": torch.ones(2)}
    values = {f"key {i}": "x" for i in range(30)}
    for write, number in ((save_file, 3), (files.save_file, 1)):
        for i in range(3):
            write(tensors, tmp_path / str(i), values)
        assert len({sha256(tmp_path / str(i)) for i in range(3)}) == number
        assert torch.equal(load_file(tmp_path / "0")["w"], tensors["w"])
        assert metadata(tmp_path / "0") == values


def test_metadata_in_any_language_keeps_the_tensors_aligned(tmp_path):
    tensors = {
        "b": torch.arange(3.0),
        "a": torch.tensor(7),
        "h": torch.ones(1, dtype=torch.bfloat16),
    }
    for i in range(9):
        values = {"class_names": "ключ ❄" * i}
        files.save_file(tensors, tmp_path / "w.safetensors", values)
        assert files.read_metadata(tmp_path / "w.safetensors") == values
        found = load_file(tmp_path / "w.safetensors")
        assert all(torch.equal(found[k], v) for k, v in tensors.items())
        header = int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
        assert header % 8 == 0


def test_files_have_the_mode_that_the_umask_says(root):
    found = {p: p.stat().st_mode & 0o777 for p in (root / "a").rglob("*") if p.is_file()}
    assert root / "a/checkpoints/step-6/state.safetensors" in found
    assert root / "a/export/student.safetensors" in found
    assert {p.name: oct(mode) for p, mode in found.items() if mode != 0o640} == {}


def test_damaged_header_is_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="damaged safetensors file"):
        files.read_metadata(tmp_path / "w.safetensors")
