"""Who a teacher, a data set and a run are: what one may stand for, and what is refused or said."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dfptkd.engine import eval_checkpoint as eval_module
from dfptkd.engine.alarms import chance_warning
from dfptkd.engine.checkpoint import load_checkpoint, save_checkpoint
from dfptkd.engine.cli import main, parse_run
from dfptkd.engine.config import DataConfig, OptimConfig, RunConfig, TeacherConfig
from dfptkd.engine.errors import DataError, StorageError, UsageError
from dfptkd.engine.eval_checkpoint import evaluate_checkpoint
from dfptkd.engine.export import export_student
from dfptkd.engine.groups import summarise
from dfptkd.engine.identity import data_identity, network_of
from dfptkd.engine.models import create_model
from dfptkd.engine.records import find_runs, read_run
from dfptkd.engine.report import report
from dfptkd.engine.study_record import archived_run
from dfptkd.engine.teacher import choose_teacher, find_teacher, teacher_run
from dfptkd.engine.train import run

SIDE = 16
TRAIN, TEST = 12, 6  # images of a class


def write_data(root: Path, classes=("cat", "dog"), seed: int = 0) -> Path:
    """Image folders of noise around a grey of each class: the seed makes other images."""
    random = np.random.default_rng(seed)
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                grey = 100 + 3 * label
                pixels = random.integers(grey - 60, grey + 60, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three data sets: the second has other images of the same classes, the third other classes."""
    root = tmp_path_factory.mktemp("data")
    write_data(root / "own")
    write_data(root / "images", seed=1)
    write_data(root / "classes", ("cat", "fox"))
    return root


def make_config(out_root: Path, data: Path, method: str = "kd", **changes) -> RunConfig:
    """Three steps an epoch; the teacher is to be found under `out_root`."""
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=2,
        global_batch=8,
        device="cpu",
        kernels="reference",
        out_root=str(out_root),
        data=DataConfig(name="folder", root=str(data), image_size=SIDE, loader="device", workers=0),
        teacher=TeacherConfig(
            name="cifar:resnet8_s2", epochs=2, lr=0.05, global_batch=8, remember="off"
        ),
        optim=OptimConfig(lr=0.02, milestones=(0.5,)),
    )
    return replace(config, **changes)


def with_teacher(config: RunConfig, **changes) -> RunConfig:
    return replace(config, teacher=replace(config.teacher, **changes))


def on(config: RunConfig, root: Path, **changes) -> RunConfig:
    return replace(config, data=replace(config.data, root=str(root), **changes))


def random_teacher(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    state = create_model("cifar:resnet8_s2", num_classes=2).state_dict()
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """An output root with a teacher of two epochs on the first data set."""
    root = tmp_path_factory.mktemp("trained")
    run(teacher_run(make_config(root, data / "own")))
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of it to work in."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def events(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [(event["kind"], event["message"]) for event in map(json.loads, lines)]


# A finished run ----------------------------------------------------------------------------------


def test_a_finished_folder_answers_for_its_own_teacher_and_data_alone(data, tmp_path, capsys):
    a, b = (random_teacher(tmp_path / f"{name}.pth", seed) for seed, name in enumerate("ab"))
    config = make_config(tmp_path / "runs", data / "own", max_steps=1)
    given = with_teacher(config, weights=a)
    result = run(given)
    before = contents(tmp_path / "runs")
    capsys.readouterr()
    for same in (given, on(given, shutil.copytree(data / "own", tmp_path / "moved"))):
        assert run(same).last == result.last
        told = f"already finished at step 1, top-1 {result.last['student_top1']:.2f} %, teacher {a}"
        assert told in capsys.readouterr().out
    for other, words in (
        (
            with_teacher(config, weights=b),
            r"another teacher \(SHA-256 \w{8} there, SHA-256 \w{8} here, ",
        ),
        (with_teacher(config, weights=str(tmp_path / "c.pth")), r"c\.pth: no such"),
        (on(given, data / "images"), "SHA-256 of the training images .* there"),
        (on(given, data / "classes"), "class 1 is 'dog' there, 'fox' here"),
    ):
        with pytest.raises(DataError, match=words) as refusal:
            run(other)
        assert "\n" not in str(refusal.value)
    for other in (with_teacher(config, weights=b), on(given, data / "images")):
        with pytest.raises(DataError, match="made with"):  # as where it goes on
            run(replace(other, max_steps=2))
    assert contents(tmp_path / "runs") == before


def test_a_run_keeps_the_teacher_that_it_found(root, data, capsys):
    config = make_config(root, data / "own", max_steps=1)
    run(config)
    own = find_teacher(config)
    better = with_teacher(config, epochs=3)
    run(teacher_run(replace(better, out_root=str(root / "elsewhere"))))
    newer = next((root / "elsewhere").iterdir())
    newer.rename(root / "newer")
    assert find_teacher(config) == root / "newer/teacher.safetensors"
    assert run(config).step == 1
    assert run(replace(config, max_steps=2)).step == 2
    assert run_json(root / "tiny-kd-seed0")["teacher"]["weights"] == str(own)
    shutil.copy(root / "newer/teacher.safetensors", own)
    with pytest.raises(DataError, match="another teacher"):
        run(replace(config, max_steps=2))
    shutil.rmtree(own.parent)
    capsys.readouterr()
    assert run(replace(config, max_steps=2)).step == 2
    assert f"its teacher {own} is no longer there" in capsys.readouterr().out
    with pytest.raises(DataError, match="another teacher"):  # the other one is not taken for it
        run(replace(config, max_steps=None))


# The search for a teacher ------------------------------------------------------------------------


def test_a_trial_is_no_teacher(root, data, tmp_path):
    config = make_config(tmp_path / "alone", data / "own")
    run(replace(teacher_run(config), max_steps=1))
    trial = tmp_path / "alone/teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    words = f"no weights for teacher .*passed over: {re.escape(str(trial))} "
    with pytest.raises(DataError, match=words + r"\(0\.333 of 2 epochs done\)"):
        run(config)
    shutil.copytree(trial.parent, root / "newer")  # beside the real one
    os.utime(root / "newer/teacher.safetensors")
    run(replace(config, out_root=str(root), max_steps=1))
    said = dict(events(root / "tiny-kd-seed0"))["teacher_choice"]
    assert said == (
        f"teachers passed over: {root}/newer/teacher.safetensors (0.333 of 2 epochs done)"
    )
    assert run_json(root / "tiny-kd-seed0")["teacher"]["weights"] == str(
        root / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    )
    run(teacher_run(config))  # the trial goes on to its end
    assert find_teacher(config, data_identity(config.data)) == trial


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda data: {"root": data / "images"}, "other data (SHA-256 of the training images"),
        (lambda data: {"root": data / "classes"}, "other data (class 1 is 'fox' there, 'dog' here"),
        (lambda data: {"root": data / "own", "limit": 8}, "trained on 8 of these 24"),
    ],
    ids=["images", "classes", "fewer"],
)  # fmt: skip
def test_a_teacher_of_other_data_is_not_found_and_used_with_a_warning(
    data, tmp_path, other, words, capsys
):
    config = make_config(tmp_path, data / "own")
    run(on(teacher_run(config), **other(data)))
    with pytest.raises(DataError, match="passed over") as refusal:
        run(config)
    assert words in str(refusal.value)
    weights = tmp_path / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")  # its header says as much
    for named in (weights, moved):
        given = with_teacher(config, weights=str(named))
        (warning,) = choose_teacher(given, data_identity(config.data)).warnings
        assert warning.startswith(f"teacher {named}: trained on ")
        assert words in warning
    capsys.readouterr()
    run(replace(given, max_steps=1))
    assert f"warning: {warning}" in capsys.readouterr().out
    assert warning in run_json(tmp_path / "tiny-kd-seed0")["warnings"]
    assert ("teacher", warning) in events(tmp_path / "tiny-kd-seed0")


def test_a_teacher_of_all_images_teaches_on_a_part_of_them(root, data):
    config = make_config(root, data / "own")
    for part in (on(config, data / "own", limit=8), on(config, data / "own", train_limit=8)):
        assert find_teacher(part, data_identity(part.data)) is not None


def test_the_teacher_of_more_epochs_wins_and_a_shorter_one_is_said(root, data, tmp_path):
    config = make_config(tmp_path, data / "own")
    short = with_teacher(config, epochs=1)
    run(teacher_run(short))
    shutil.move(tmp_path / "teacher-folder-cifar-resnet8_s2-seed0", root / "short")
    os.utime(root / "short/teacher.safetensors")  # the newer one
    here = data_identity(config.data)
    choice = choose_teacher(replace(config, out_root=str(root)), here)
    assert Path(choice.weights).parent.name == "teacher-folder-cifar-resnet8_s2-seed0"
    assert "short/teacher.safetensors (1 of 1 epochs, top-1 " in choice.said[0]
    assert choice.warnings == []
    (warning,) = choose_teacher(
        with_teacher(config, weights=str(root / "short/teacher.safetensors")), here
    ).warnings
    assert warning.endswith("trained for 1 epochs, where the recipe has 2")


def test_what_a_file_says_of_itself_is_what_its_training_measured(root):
    folder = root / "teacher-folder-cifar-resnet8_s2-seed0"
    alone = shutil.copy(folder / "teacher.safetensors", root / "alone.safetensors")
    status = json.loads((folder / "status.json").read_text())
    for path in (folder / "teacher.safetensors", alone):
        known = network_of(path)
        assert (known.model, known.epochs, known.planned_epochs) == ("cifar:resnet8_s2", 2.0, 2)
        assert known.top1 == status["last"]["student_top1"]
        assert known.data.class_names == ("cat", "dog")
        assert (known.data.train_images, known.data.test_images) == (2 * TRAIN, 2 * TEST)


# What a teacher is worth -------------------------------------------------------------------------


def test_chance_is_that_of_the_most_frequent_class():
    assert "1.00 % ± 0.10" in chance_warning(1.2, [100] * 100)  # 10,000 images of 100 classes
    assert chance_warning(1.4, [100] * 100) is None
    assert "80.00 % ± 4.00" in chance_warning(80.0, [80, 20])
    assert chance_warning(93.0, [80, 20]) is None


def test_a_teacher_at_chance_is_warned_of_on_any_data(data, tmp_path, capsys):
    config = make_config(tmp_path, data / "own", max_steps=1)
    state = create_model("cifar:resnet8_s2", num_classes=2).state_dict()
    state = {name: torch.zeros_like(t) if "fc" in name else t for name, t in state.items()}
    save_file(state, tmp_path / "t.safetensors")  # it always names the first class
    run(with_teacher(config, weights=str(tmp_path / "t.safetensors")))
    assert "warning: the teacher reaches 50.00 % on 12 test images" in capsys.readouterr().out
    assert "teacher at chance" in report([tmp_path]).read_text()


def test_an_expectation_is_of_a_teacher_and_a_data_set(data, tmp_path):
    config = make_config(tmp_path, data / "own", max_steps=1)
    config = with_teacher(config, weights=random_teacher(tmp_path / "t.pth", 0), expected_top1=99.9)
    for name, of, warned in (
        ("any", None, True),
        ("own", ("cifar:resnet8_s2", "folder"), True),
        ("data", ("cifar:resnet8_s2", "cifar100"), False),
        ("teacher", ("cifar:resnet14_s2", "folder"), False),
    ):
        run(replace(with_teacher(config, expected_of=of), out=str(tmp_path / name)))
        warnings = str(run_json(tmp_path / name)["warnings"])
        assert ("under the recipe's 99.90 %" in warnings) == warned
        assert ("below expectation" in report([tmp_path / name]).read_text()) == warned


def test_recipes_expect_of_their_own_data_and_a_user_of_any():
    recipe = "cifar100.resnet56_resnet20"
    config = parse_run("train", [recipe, "--data.name", "folder"])
    assert config.teacher.expected_of == ("cifar:resnet56", "cifar100")
    config = parse_run("train", [recipe, "--data.name", "folder", "--teacher.expected-top1", "90"])
    assert (config.teacher.expected_top1, config.teacher.expected_of) == (90.0, None)


# Other epochs ------------------------------------------------------------------------------------


def test_other_epochs_are_refused_unless_asked_for_and_then_said_everywhere(data, tmp_path, capsys):
    config = make_config(tmp_path, data / "own", "ce")
    out = tmp_path / "tiny-ce-seed0"
    run(config)
    before = contents(out)
    for epochs, words in ((4, "epochs: 2 there, 4 here.*--resume extend"), (1, "epochs: 2 there")):
        with pytest.raises(DataError, match=words):
            run(replace(config, epochs=epochs))
    with pytest.raises(UsageError, match="of a run of 2 epochs: expected as many, or more"):
        run(replace(config, epochs=1, resume="extend"))
    assert contents(out) == before
    capsys.readouterr()
    longer = replace(config, epochs=4)
    run(replace(longer, resume="extend", max_steps=9))
    text = "extended from 2 to 4 epochs at step 6"
    assert f"warning: {text}" in capsys.readouterr().out
    assert run(longer).step == 12  # it is one of 4 epochs by now, and stays marked
    assert run(longer).step == 12
    assert run_json(out)["extended"] == [{"before": 2, "after": 4, "step": 6}]
    assert text in run_json(out)["warnings"]
    assert events(out).count(("extended", text)) == 1
    assert network_of(out / "student.safetensors").extended == text
    whole = replace(longer, out=str(tmp_path / "whole"))
    run(whole)
    page = report([tmp_path]).read_text()
    assert "longer than planned" in page
    labels = {group.label: group.n for group in summarise(map(read_run, find_runs(tmp_path)))}
    assert labels == {
        "labels only, extended=extendedfrom2to4epochsatstep6": 1,
        "labels only, extended=no": 1,
    }


def test_a_stopped_run_of_other_epochs_is_refused_too(data, tmp_path):
    config = make_config(tmp_path, data / "own", "ce", max_steps=1)
    run(config)
    with pytest.raises(DataError, match="epochs: 2 there, 4 here"):
        run(replace(config, epochs=4, max_steps=None))
    assert run(replace(config, max_steps=2)).step == 2


# eval --------------------------------------------------------------------------------------------


def accuracy(state: dict[str, torch.Tensor], folder: Path) -> float:
    """Top-1 in percent of a network on val/, without anything of the engine's but the network."""
    model = create_model("cifar:resnet8_s2", num_classes=2)
    model.load_state_dict(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    hits = []
    for label, name in enumerate(sorted(p.name for p in (folder / "val").iterdir())):
        for file in sorted((folder / "val" / name).iterdir()):
            pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()) / 255
            image = ((pixels - mean) / std).permute(2, 0, 1)[None]
            with torch.no_grad():
                hits.append(int(model.eval()(image).argmax()) == label)
    return 100 * sum(hits) / len(hits)


def test_eval_measures_a_file_of_somebody_else(data, tmp_path, capsys):
    file = Path(random_teacher(tmp_path / "theirs.pth", 3))
    args = ["eval", str(file), "--device", "cpu"]
    assert main(args) == 2
    assert "theirs.pth does not say which network it holds: expected --model" in (
        capsys.readouterr().err
    )
    args += ["--model", "cifar:resnet8_s2"]
    assert main(args) == 2
    assert "expected --data.name NAME" in capsys.readouterr().err
    args += ["--data.name", "folder", "--data.loader", "device", "--data.image-size", str(SIDE)]
    for name in ("own", "images"):
        assert main([*args, "--data.root", str(data / name)]) == 0
        expected = accuracy(torch.load(file), data / name)
        assert f"top-1 {expected:.2f} %" in capsys.readouterr().out
    assert main([*args, "--data.root", str(write_data(tmp_path / "three", ("a", "b", "c")))]) == 3
    assert "2 classes, expected 3" in capsys.readouterr().err


def test_a_file_of_another_network_of_equal_names_is_said(root, data, tmp_path, capsys):
    own = root / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    file = shutil.copy(own, tmp_path / "alone.safetensors")
    said = f"{file}{{}} says that it is cifar:resnet8_s2, not cifar:resnet8\n"
    args = ["eval", str(file), "--data.root", str(data / "own"), "--device", "cpu", "--model"]
    assert main([*args, "cifar:resnet8"]) == 0
    out = capsys.readouterr().out
    assert "note: " + said.format("") in out
    assert "logged" not in out
    assert main([*args, "resnet8_s2"]) == 0
    out = capsys.readouterr().out
    assert "note" not in out
    assert "logged by the run" in out
    config = make_config(tmp_path / "out", data / "own", "ce", student_weights=str(file))
    run(replace(config, max_steps=1, student="cifar:resnet8"))
    assert "warning: student " + said.format(":") in capsys.readouterr().out
    config = make_config(root, data / "own", student="resnet8_s2", student_weights=str(file))
    run(with_teacher(replace(config, max_steps=1), name="resnet8_s2"))
    assert "says that it is" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch 0: expected 1 or more"),
        (
            ("--data.name", "cifar100", "--data.image-size", "64"),
            "data.image_size with data.name='cifar100': expected image files",
        ),
    ],
)
def test_eval_refuses_what_it_cannot_do(root, options, message, capsys):
    file = root / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    assert main(["eval", str(file), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_eval_takes_the_file_of_a_package_and_says_what_it_is_normalised_by(
    data, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "weights_of_mine"
    folder.mkdir()
    random_teacher(folder / "w.pth", 3)
    state = torch.load(folder / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    args = ["--model", "cifar:resnet8_s2", "--data.name", "folder", "--data.loader", "device"]
    args += ["--data.image-size", str(SIDE), "--data.root", str(data / "own"), "--device", "cpu"]
    assert main(["eval", "package:weights_of_mine", *args]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {accuracy(state, data / 'own'):.2f} %" in out
    assert "note" not in out
    file = tmp_path / "half.safetensors"
    save_file(state, file, {"mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"})
    assert main(["eval", str(file), *args]) == 0
    assert (
        "note: images are normalised by the network's own mean 0.5 0.5 0.5 and std 0.2 0.2 0.2 "
        f"({file})\n"
    ) in capsys.readouterr().out


def test_eval_knows_the_files_that_runs_leave(root, data, tmp_path):
    file = root / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    expected = accuracy(load_file(file), data / "own")
    for path in (file, alone, file.parent):
        found = evaluate_checkpoint(path, root=str(data / "own"), loader="device", device="cpu")
        assert found.top1 == pytest.approx(expected)
        assert found.logged == pytest.approx(expected, abs=1e-3)
        assert found.notes == []


def test_a_file_alone_says_how_its_images_were_cut(data, tmp_path, monkeypatch):
    """A network of photographs' crops is evaluated through them, wherever its file lies."""
    config = make_config(tmp_path, data / "own", "ce", max_steps=1)
    run(replace(config, data=replace(config.data, crops="photographs", loader="torchvision")))
    file = tmp_path / "tiny-ce-seed0/student.safetensors"
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    assert network_of(Path(alone)).data.preprocessing["crops"] == "photographs"
    real, cut = eval_module.load_data, []
    monkeypatch.setattr(
        eval_module,
        "load_data",
        lambda config, *rest: cut.append(config.crops) or real(config, *rest),
    )
    options = {"root": str(data / "own"), "loader": "torchvision", "device": "cpu"}
    for path in (file.parent, Path(alone)):
        evaluate_checkpoint(path, **options)
    small = evaluate_checkpoint(Path(alone), crops="small", **options).top1
    assert cut == ["photographs", "photographs", "small"]
    assert small == pytest.approx(accuracy(load_file(file), data / "own"))


def test_eval_says_that_data_are_others_and_refuses_other_classes(root, data):
    folder = root / "teacher-folder-cifar-resnet8_s2-seed0"
    for path in (folder, folder / "teacher.safetensors"):
        options = {"loader": "device", "device": "cpu"}
        found = evaluate_checkpoint(path, root=str(data / "images"), **options)
        assert found.top1 == pytest.approx(accuracy(load_file(folder / "teacher.safetensors"),
                                                    data / "images"))  # fmt: skip
        (note,) = found.notes
        assert note.startswith("not the test images of its training: SHA-256 of the test images")
        with pytest.raises(DataError, match="class 1 is 'dog' there, 'fox' here"):
            evaluate_checkpoint(path, root=str(data / "classes"), **options)


# Groups ------------------------------------------------------------------------------------------


def test_runs_on_different_data_are_never_one_group(data, tmp_path, capsys):
    config = make_config(tmp_path, data / "own", "ce", max_steps=1)
    for seed, name in enumerate(("own", "own", "images")):
        run(replace(on(config, data / name), seed=seed))
    kept = replace(config, checkpoint_steps=1, checkpoint_minutes=0.0, eval_batch=4, seed=3)
    run(replace(kept, data=replace(kept.data, timeout=9.0)))
    page = report([tmp_path]).read_text()
    runs = [read_run(folder) for folder in find_runs(tmp_path)]
    hashes = [run_json(tmp_path / f"tiny-ce-seed{s}")["data"]["train_sha256"][:8] for s in (0, 2)]
    groups = {group.options["data.train"]: group.n for group in summarise(runs)}
    assert groups == {hashes[0]: 3, hashes[1]: 1}
    printed = capsys.readouterr().out
    assert all(f"data.train={name}" in printed for name in hashes)
    assert all(f"folder ({name}, " in page for name in hashes)
    alike = [record for record in runs if record.run["data"]["train_sha256"][:8] == hashes[0]]
    for record in (*alike[:1], *[r for r in runs if r not in alike]):  # as of an older version
        for key in ("train_sha256", "test_sha256"):
            del record.run["data"][key]
    assert [group.n for group in summarise(alike)] == [3]  # what is not known tells nothing apart
    assert [group.n for group in summarise(runs)] == [4]


def test_a_study_counts_no_run_of_other_data_or_of_changed_epochs(data, tmp_path):
    config = make_config(tmp_path, data / "own", "ce")
    run(config)
    assert archived_run(config) is not None
    with pytest.raises(DataError, match=r"holds another run \(SHA-256 of the training images"):
        archived_run(on(config, data / "images"))
    longer = replace(config, epochs=3)
    run(replace(longer, resume="extend"))
    with pytest.raises(DataError, match=r"\(extended from 2 to 3 epochs at step 6"):
        archived_run(longer)


# Run folders of versions that did not know of all this -------------------------------------------


def strip(folder: Path) -> None:
    """Take out of a run folder what older versions did not write."""
    record = run_json(folder)
    for key in ("train_sha256", "test_sha256"):
        del record["data"][key]
    del record["extended"], record["config"]["teacher"]["expected_of"]
    if record["teacher"] is not None:
        del record["teacher"]["trained"]
    (folder / "run.json").write_text(json.dumps(record))
    for path in (folder / "checkpoints").glob("step-*"):
        found = load_checkpoint(path)
        state = found.state
        state["data"] = {
            key: value
            for key, value in state["data"].items()
            if key in ("name", "num_classes", "train_images", "loader", "train_files")
        }
        del state["extended"], state["config"]["teacher"]["expected_of"]
        shutil.rmtree(path)
        save_checkpoint(path.parent, found.tensors, state, keep=9, is_best=False)
    for name in ("student", "teacher"):
        path = folder / f"{name}.safetensors"
        if path.is_file():
            old = {"model": record["config"]["student"], "num_classes": "2", "top1": "50.0000"}
            save_file(load_file(path), path, old)


def test_older_run_folders_go_on_report_export_and_evaluate(root, data, capsys):
    config = make_config(root, data / "own", max_steps=1)
    run(config)
    teacher, out = root / "teacher-folder-cifar-resnet8_s2-seed0", root / "tiny-kd-seed0"
    strip(teacher)
    strip(out)
    assert find_teacher(config, data_identity(config.data)) == teacher / "teacher.safetensors"
    assert run(config).step == 1
    with pytest.raises(DataError, match="class 1 is 'dog' there, 'fox' here"):
        run(on(config, data / "classes"))
    assert "labels only" in report([root]).read_text()
    assert export_student(out, formats=("safetensors",))
    found = evaluate_checkpoint(out, device="cpu")
    assert found.top1 == pytest.approx(accuracy(load_file(out / "student.safetensors"),
                                                data / "own"))  # fmt: skip
    assert run(replace(config, max_steps=2)).step == 2
    trial = run_json(teacher)
    (teacher / "status.json").write_text(json.dumps({"state": "finished", "epoch": 1.0}))
    assert trial["config"]["epochs"] == 2
    assert find_teacher(config, data_identity(config.data)) is None


def test_a_student_that_began_from_other_weights_is_another_run(tmp_path, data):
    """The file may be another one by now, under the same name."""
    file = tmp_path / "start.pth"
    random_teacher(file, 0)
    config = make_config(tmp_path / "runs", data / "own", "ce", student_weights=str(file))
    out = run(replace(config, max_steps=2)).out
    begun = json.loads((out / "run.json").read_text())["student"]["initial_sha256"]
    assert run(replace(config, max_steps=2)).step == 2  # finished, and answers for it
    same = run(replace(config, out=str(tmp_path / "a"), seed=1)).out
    random_teacher(file, 1)
    for changes in ({"max_steps": 2}, {}):  # finished; to go on
        with pytest.raises(DataError, match=rf"began from other weights \(SHA-256 {begun[:8]} th"):
            run(replace(config, **changes))
    other = run(replace(config, out=str(tmp_path / "b"), seed=2)).out
    groups = summarise([read_run(folder) for folder in (same, other)])
    assert [len(group.runs) for group in groups] == [1, 1]


def test_an_earlier_teacher_in_the_way_is_named_with_what_helps(root, data):
    config = teacher_run(make_config(root, data / "own"))
    with pytest.raises(DataError, match="another --out-root, or that folder of an earlier teacher"):
        run(replace(config, global_batch=4))


def test_statistics_have_blanks_or_commas_between(root, data, capsys):
    file = root / "teacher-folder-cifar-resnet8_s2-seed0/teacher.safetensors"
    args = ["eval", str(file), "--data.root", str(data / "own"), "--data.std"]
    figures = []
    for words in (["0.5", "0.25", "0.2"], ["0.5,0.25,0.2"]):
        assert main([*args, *words, "--data.mean", "0.5,0.5,0.5"]) == 0
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1]
    assert main([*args, "0.5", "x"]) == 2
    assert "--data.std 0.5 x: expected three numbers" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_output_folder_is_named(tmp_path, data, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match=r"out: a file, expected a folder"):
        run(make_config(tmp_path, data / "own", "ce", out=str(tmp_path / "out")))


def test_the_network_of_a_teacher_run_is_the_one_that_its_record_names():
    config = parse_run("train-teacher", ["quickstart", "--student", "cifar:resnet8"])
    assert config.student == config.teacher.name == "cifar:resnet8"
