"""The command line: exit codes, one-line errors, the frozen list of options."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfptkd.engine.cli import main, option_types, parse_run, recipe_names
from dfptkd.engine.config import RunConfig

PAIR = "cifar100.wrn_40_2_shufflenetv1"
STUDENT = (
    "--data.name synthetic --data.image-size 16 --data.num-classes 4 --data.limit 24 "
    "--student cifar:resnet8_s2 --global-batch 8 --epochs 1 --device cpu"
).split()
OWN_TEACHER = (
    "--teacher.name cifar:resnet8_s2 --teacher.epochs 1 --teacher.global-batch 8"
).split()
TINY = [*STUDENT, *OWN_TEACHER]


def refused(args: str, capsys) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = main(args.split())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("dfptkd: ")
    return code, lines[0]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("trian x", 2, ["'trian'", "train"]),
        ("train", 2, ["expected a recipe", "quickstart"]),
        ("train quickstrat", 2, ["'quickstrat'", "did you mean quickstart?"]),
        ("train cifar100.wrn_40_2_shufflenet", 2, [f"did you mean {PAIR}?"]),
        ("train quickstart --lrr 3", 2, ["--lrr", "did you mean"]),
        ("train quickstart --optim.learning-rate 3", 2, ["unknown option", "--optim."]),
        ("train quickstart --epochs x", 2, ["--epochs", "'x'"]),
        ("train quickstart --epochs", 2, ["--epochs"]),
        ("train quickstart --epochs 0", 2, ["epochs=0", "at least 1"]),
        ("train quickstart --method kdd", 2, ["'kdd'", "dfpt_plus"]),
        ("train quickstart --arm reverse", 2, ["'reverse'", "reverse_kl"]),
        ("train quickstart --loss.tau -1", 2, ["loss.tau=-1.0", "above 0"]),
        ("train quickstart --prompt.kernels 3,4", 2, ["prompt.kernels=(3, 4)", "odd"]),
        ("train quickstart --optim.milestones 0.9,0.5", 2, ["optim.milestones", "ascending"]),
        ("train quickstart --device tpu --teacher.weights x", 2, ["'tpu'", "cpu or cuda"]),
        (f"train {PAIR} --device cpu --step.mode graph", 2, ["step.mode='graph'", "CUDA device"]),
        (f"train {PAIR} --data.root /nowhere", 3, ["/nowhere", "cifar-100"]),
        (f"train {PAIR} --method ce", 3, ["--data.root", "DFPTKD_DATA"]),
        (f"plan {PAIR} --probee", 2, ["--probee", "did you mean --probe?"]),
        (f"profile {PAIR} --step 3", 2, ["--step", "did you mean --steps?"]),
        ("train --config /nowhere.json", 3, ["/nowhere.json", "run.json"]),
        ("eval /nowhere", 3, ["/nowhere"]),
        ("eval", 2, ["checkpoint"]),
        ("report /nowhere", 3, ["/nowhere"]),
        ("export /nowhere", 3, ["/nowhere"]),
        ("export . --frobnicate", 2, ["--frobnicate"]),
    ],
)
def test_bad_input_gets_one_line_and_the_right_exit_code(args, code, words, capsys, tmp_path):
    args = f"{args} --out-root {tmp_path / 'runs'}" if args.startswith("train ") else args
    got, line = refused(args, capsys)
    assert got == code, line
    for word in words:
        assert word in line
    assert not (tmp_path / "runs").exists(), "nothing may be written"


def test_no_teacher_weights_says_how_to_make_them(capsys, tmp_path, cifar100_root):
    code, line = refused(
        f"train {PAIR} --data.root {cifar100_root} --data.limit 100 --out-root {tmp_path}", capsys
    )
    assert code == 3
    assert f"dfptkd train-teacher {PAIR}" in line


def test_a_teacher_of_another_class_count_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train-teacher", "quickstart", *TINY]) == 0
    weights = "runs/teacher-synthetic-cifar-resnet8_s2-seed0/teacher.safetensors"
    capsys.readouterr()
    args = [*STUDENT, "--data.num-classes", "5", "--teacher.weights", weights]
    args += ["--teacher.name", "cifar:resnet8_s2"]
    assert main(["train", "quickstart", *args]) == 3
    line = capsys.readouterr().err
    assert "4 classes, expected 5" in line


def test_a_run_its_repetition_evaluation_export_and_report(capsys, tmp_path, monkeypatch):
    """The words of the README, on tiny data; `quickstart` makes its own teacher."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--method", "dfpt", "--seeds", "0,1", *TINY]) == 0
    out = Path("runs/quickstart-dfpt-seed1")
    printed = capsys.readouterr().out
    assert "teacher cifar:resnet8_s2: top-1" in printed
    assert main(["train", "--config", str(out / "run.json"), "--out", "runs/again"]) == 0
    a, b = (json.loads((p / "status.json").read_text()) for p in (out, Path("runs/again")))
    assert a["last"] == b["last"]
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    assert f"top-1 {a['last']['student_top1']:.2f} %" in capsys.readouterr().out
    assert main(["export", str(out), "--formats", "safetensors"]) == 0
    assert (out / "export/student.safetensors").is_file()
    assert main(["report", "runs", "--out", "runs/all.html"]) == 0
    assert "DFPT-KD" in capsys.readouterr().out
    assert main(["eval", "runs/teacher-synthetic-cifar-resnet8_s2-seed0"]) == 0


def test_interrupting_saves_and_leaves_with_75(tmp_path):
    command = [sys.executable, "-m", "dfptkd.engine.cli", "train", "quickstart", "--method", "ce"]
    options = [*STUDENT, "--epochs", "5000", "--out-root", str(tmp_path), "--eval-every", "1000"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = tmp_path / "quickstart-ce-seed0"
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert "stopped by SIGINT at step" in errors
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (out / f"checkpoints/step-{status['step']}/manifest.json").is_file()


def test_closed_output_is_no_failure(tmp_path):
    command = f"{sys.executable} -m dfptkd.engine.cli --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage: dfptkd")
    assert "Traceback" not in done.stderr


def test_the_list_of_options_is_frozen():
    """Changing an option's name breaks users: regenerate the file on purpose, never by accident.

    DFPTKD_FREEZE_OPTIONS=1 pytest tests/engine/test_cli.py
    """
    frozen = Path(__file__).with_name("options.txt")
    options = "\n".join(option_types(RunConfig)) + "\n"
    if os.environ.get("DFPTKD_FREEZE_OPTIONS"):
        frozen.write_text(options)
    assert options == frozen.read_text()


def test_every_option_reaches_the_configuration():
    config = parse_run(
        "train",
        f"{PAIR} --seeds 1,2 --prompt.kernels=1,3,5 --prompt.insert_stages 2,3 "
        "--data.no-flip --deterministic --teacher.stages layer1,layer2 --max-steps 8".split(),
    )
    assert config.seeds == (1, 2)
    assert config.prompt.kernels == (1, 3, 5)
    assert config.prompt.insert_stages == (2, 3)
    assert not config.data.flip
    assert config.deterministic
    assert config.teacher.stages == ("layer1", "layer2")
    assert config.max_steps == 8
    rival = parse_run("train", [PAIR, "--method", "dkd", "--loss.dkd-beta", "3"])
    assert (rival.method, rival.loss.dkd_beta) == ("dkd", 3)
    assert rival.loss.warmup_epochs == 20  # DKD's own, from the recipe


def test_an_arm_changes_the_recipe_and_its_folder():
    config = parse_run("train", [PAIR, "--arm", "kd_matched"])
    assert (config.loss.student_ce, config.loss.student_teacher) == (0.1, 0.45)
    assert config.arm == "kd_matched"


def test_M24_every_recipe_is_listed(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipe_names())
    assert len(recipe_names()) >= 14


def test_help_lists_every_option(capsys):
    assert main(["train", "quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    missing = [n for n in option_types(RunConfig) if n not in text and "-no-" not in n]
    assert not [n for n in missing if ".no-" not in n]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ({"state": "finished", "step": 8}, 0, "finished at step 8"),
        ({"state": "stopped", "step": 3}, 75, "saved: the same command goes on"),
        ({"state": "failed", "step": 3, "exit_code": 4}, 4, "failed at step 3"),
        ({"state": "failed", "step": 3}, 1, "failed at step 3"),  # of an older version
        ({"state": "running", "step": 3}, 1, "killed since"),
    ],
)
def test_status_leaves_with_the_code_that_a_launcher_hides(tmp_path, capsys, status, code, words):
    now = time.time()
    (tmp_path / "status.json").write_text(json.dumps({**status, "time": now}))
    assert main(["status", str(tmp_path), "--since", f"{now - 5}"]) == code
    assert words in capsys.readouterr().out
    # What an earlier job has left says nothing of this one, which may not even have begun.
    assert main(["status", str(tmp_path), "--since", f"{now + 5}"]) == 1
    assert "not started since then" in capsys.readouterr().out


def test_a_full_disk_behind_standard_output_is_named(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 3}))
    command = [sys.executable, "-u", "-m", "dfptkd.engine.cli", "status", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        5, "dfptkd: standard output: No space left on device\n",
    )  # fmt: skip


def test_status_of_several_runs_is_that_of_the_worst(tmp_path, capsys):
    states = {"a": {"state": "finished"}, "b": {"state": "stopped"}, "c": {"state": "failed"}}
    for name, status in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({**status, "exit_code": 3}))
    folders = [str(tmp_path / name) for name in states]
    assert [main(["status", *folders[:n]]) for n in (1, 2, 3)] == [0, 75, 3]
    code, line = refused(f"status {tmp_path / 'd'}", capsys)
    assert code == 3
    assert "status.json" in line
