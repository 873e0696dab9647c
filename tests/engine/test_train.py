"""Real runs of a few steps: files on disk, resume, stop, refusals.

M8, M9, M13-M16, M20-M22, M44-M47.
"""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfptkd.engine import run_state
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import load_checkpoint
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
)
from dfptkd.engine.errors import DataError, NumericError, Stopped, UsageError
from dfptkd.engine.eval_checkpoint import evaluate_checkpoint
from dfptkd.engine.models import create_model
from dfptkd.engine.resume import check_same_run
from dfptkd.engine.teacher import find_teacher, teacher_run
from dfptkd.engine.train import run, run_seeds

METHODS = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An output root that holds a trained (if poor) teacher."""
    root = tmp_path_factory.mktemp("runs")
    run(teacher_run(make_config(root)))
    return root


def make_config(root: Path, method: str = "dfpt", **changes) -> RunConfig:
    """Six steps of 8 synthetic images in two epochs."""
    config = RunConfig(
        recipe="tiny",
        method=method,
        student="cifar:resnet8_s2",
        epochs=2,
        global_batch=8,
        eval_batch=16,
        device="cpu",
        out_root=str(root),
        data=DataConfig(name="synthetic", image_size=16, num_classes=4, limit=24),
        teacher=TeacherConfig(name="cifar:resnet14_s2", epochs=2, global_batch=8),
        optim=OptimConfig(lr=0.02, milestones=(0.5,)),
    )
    return replace(config, **changes)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def state_of(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    checkpoint = load_checkpoint(folder / "checkpoints" / f"step-{step}")
    return checkpoint.tensors, checkpoint.state


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_the_design_says(root, method):
    result = run(make_config(root, method))
    out = root / f"tiny-{method}-seed0"
    assert result.out == out
    record = json.loads((out / "run.json").read_text())
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "finished"
    assert (status["step"], status["total_steps"]) == (6, 6)
    assert status["last"]["student_top1"] == result.last["student_top1"]
    assert [float(row["epoch"]) for row in rows(out)] == [1.0, 2.0]
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "checkpoints/index.json").read_text())["last"] == "step-6"
    student = create_model("cifar:resnet8_s2", num_classes=4)
    student.load_state_dict(load_file(out / "student.safetensors"))  # plain names, M9
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    # M20: what the paper does not give is flagged in the record, with its value
    if method in ("dfpt", "dfpt_plus"):
        assert record["not_known_from_paper"]["loss.prompt_student"] == 1.0
    else:
        assert record["not_known_from_paper"] == {}
    assert (record["teacher"] is None) == (method == "ce")


def test_M22_M47_the_log_of_a_dual_path_run(root):
    run(make_config(root))
    for row in rows(root / "tiny-dfpt-seed0"):
        for path in ("teacher", "prompt"):
            whole = float(row[f"kl/{path}_student"])
            parts = [float(row[f"kl/{path}_student{part}"]) for part in ("_target", "_nontarget")]
            assert math.isclose(sum(parts), whole, rel_tol=1e-4, abs_tol=1e-6)
            assert 0 < float(row[f"prob/{path}_target"]) < 1
        assert float(row["kl/teacher_prompt"]) > 0
        assert all(float(row[f"prompt_norm/stage{i}"]) > 0 for i in (1, 2, 3))
        assert float(row["test/prompt_top1"]) >= 0


def test_M15_the_student_and_the_data_order_are_equal_under_every_method(root, monkeypatch):
    seen: dict[str, list] = {}

    class Recorder(train_module.TrainStep):
        def __call__(self, batch, step):
            method = self.config.method
            entry = (batch.indices.tolist(), batch.flip.tolist())
            if step == 0:
                entry += (self.method.student.conv1.weight.detach().clone(),)
            seen.setdefault(method, []).append(entry)
            super().__call__(batch, step)

    monkeypatch.setattr(train_module, "TrainStep", Recorder)
    for method in ("ce", "kd", "dfpt", "dfpt_plus"):
        run(make_config(root, method, out=str(root / f"order-{method}")))
    first = seen.pop("ce")
    for other in seen.values():
        assert torch.equal(other[0][2], first[0][2])
        assert [entry[:2] for entry in other] == [entry[:2] for entry in first]


def test_M8_M13_a_run_leaves_the_teacher_as_it_was(root, monkeypatch):
    made = {}

    def remember(config, student, teacher, *rest):
        made["before"] = {k: v.clone() for k, v in teacher.state_dict().items()}
        made["teacher"] = teacher
        return train_module_build(config, student, teacher, *rest)

    train_module_build = train_module.build_method
    monkeypatch.setattr(train_module, "build_method", remember)
    for method in ("dfpt", "dfpt_plus"):
        run(make_config(root, method, out=str(root / f"frozen-{method}")))
        after = made["teacher"].state_dict()
        assert all(torch.equal(after[k].cpu(), v) for k, v in made["before"].items())


def assert_same_end(a: Path, b: Path, step: int) -> None:
    """Tolerance 0 on every tensor and number of the last checkpoint; equal metric rows."""
    (tensors_a, state_a), (tensors_b, state_b) = state_of(a, step), state_of(b, step)
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name
    timed = {"seconds", "speeds"}
    for key in state_a["progress"].keys() - timed:
        assert state_a["progress"][key] == state_b["progress"][key], key
    clocks = {"seconds", "images_per_second"}
    strip = [[{k: v for k, v in r.items() if k not in clocks} for r in rows(x)] for x in (a, b)]
    assert strip[0] == strip[1]


class StopAt:
    """Sends this process a signal in the middle of a step."""

    def __init__(self, monkeypatch, step: int, number=signal.SIGTERM):
        original = train_module.TrainStep.__call__

        def call(trainer_step, batch, at):
            original(trainer_step, batch, at)
            if at == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train_module.TrainStep, "__call__", call)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_end(root, tmp_path, monkeypatch, method, stop_after):
    """In mid-epoch (step 2) and at the epoch's edge (step 3)."""
    optim = OptimConfig(lr=0.02, milestones=(0.5,), ema_decay=0.9, clip_grad_norm=1.0)
    whole = make_config(root, method, out=str(tmp_path / "whole"), optim=optim)
    run(whole)
    with monkeypatch.context() as patch:
        StopAt(patch, stop_after)
        with pytest.raises(Stopped, match=f"SIGTERM at step {stop_after + 1}"):
            run(replace(whole, out=str(tmp_path / "stopped")))
    status = json.loads((tmp_path / "stopped/status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", stop_after + 1)
    run(replace(whole, out=str(tmp_path / "stopped")))
    assert_same_end(tmp_path / "whole", tmp_path / "stopped", 6)


def test_a_run_that_is_past_its_last_step_is_refused(root, tmp_path, monkeypatch):
    config = make_config(root, "kd", out=str(tmp_path / "run"))
    StopAt(monkeypatch, 2)
    with pytest.raises(Stopped):
        run(config)
    before = (tmp_path / "run/status.json").read_bytes()
    with pytest.raises(UsageError, match=r"max_steps=1: .*step-3 is at step 3: expected as many"):
        run(replace(config, max_steps=1))
    assert (tmp_path / "run/status.json").read_bytes() == before
    assert run(replace(config, max_steps=3)).step == 3


def test_resume_control_a_lost_momentum_shows(root, tmp_path, monkeypatch):
    """Negative control: with one part of the state not restored the ends differ."""
    whole = make_config(root, "kd", out=str(tmp_path / "whole"))
    run(whole)
    StopAt(monkeypatch, 2)
    with pytest.raises(Stopped):
        run(replace(whole, out=str(tmp_path / "stopped")))
    monkeypatch.setattr(run_state, "restore_optimizer", lambda *_: None)
    run(replace(whole, out=str(tmp_path / "stopped")))
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "whole", tmp_path / "stopped", 6)


def test_a_run_goes_on_in_another_execution_mode(root, tmp_path):
    """Eager up to step 3, compiled to the end: within rounding where eager alone ends."""
    config = make_config(root, "kd", out=str(tmp_path / "mixed"), optim=OptimConfig(lr=1e-3))
    run(replace(config, max_steps=3))
    torch.compiler.reset()
    result = run(replace(config, kernels="native", step=StepConfig(mode="compile")))
    assert result.step == 6
    assert [row["step"] for row in rows(tmp_path / "mixed")] == ["3", "6"]
    run(replace(config, out=str(tmp_path / "eager")))
    ends = [state_of(tmp_path / name, 6)[0] for name in ("mixed", "eager")]
    start = state_of(tmp_path / "mixed", 3)[0]
    names = [k for k in start if k.startswith("student.") and k.endswith("weight")]
    ways = [torch.cat([(end[k] - start[k]).flatten() for k in names]) for end in ends]
    assert 0 < (ways[0] - ways[1]).norm() < 0.05 * ways[1].norm()


def test_max_steps_stops_evaluates_saves_and_can_go_on(root, tmp_path):
    config = make_config(root, out=str(tmp_path / "a"))
    result = run(replace(config, max_steps=2))
    assert result.step == 2
    assert [row["step"] for row in rows(tmp_path / "a")] == ["2"]
    measured = evaluate_checkpoint(tmp_path / "a" / "checkpoints" / "step-2", device="cpu")
    assert measured.top1 == pytest.approx(result.last["student_top1"], abs=1e-3)
    assert measured.logged == pytest.approx(measured.top1, abs=1e-3)
    again = run(replace(config, max_steps=2))
    assert again.last == result.last
    assert run(config).step == 6


def test_a_run_from_before_an_option_goes_on_under_its_default(root, tmp_path):
    """And under no other value: the option's default is what was done before there was one."""
    config = make_config(root, out=str(tmp_path / "a"), max_steps=1)
    run(config)
    found = load_checkpoint(tmp_path / "a" / "checkpoints" / "step-1")
    for option in ("crd", "decoupled"):
        del found.state["config"]["loss"][option]
    check_same_run(config, found)
    with pytest.raises(DataError, match=r"loss\.crd: 0\.0 there, 0\.8 here"):
        check_same_run(replace(config, loss=replace(config.loss, crd=0.8)), found)
    found.state["config"]["loss"]["stranger"] = 1
    with pytest.raises(DataError, match=r"loss\.stranger: 1 there, None here"):
        check_same_run(config, found)


def test_a_finished_run_is_left_alone(root, tmp_path):
    config = make_config(root, "ce", out=str(tmp_path / "a"))
    run(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    run(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before


def test_seeds_make_a_run_each_and_differ(root):
    results = run_seeds(make_config(root, "ce", seeds=(3, 4)))
    assert [r.out.name for r in results] == ["tiny-ce-seed3", "tiny-ce-seed4"]
    weights = [load_file(r.out / "student.safetensors")["conv1.weight"] for r in results]
    assert not torch.equal(*weights)


def test_refusals_name_what_was_wrong_and_overwrite_nothing(root, tmp_path):
    config = make_config(root, out=str(tmp_path / "a"), max_steps=1)
    run(config)
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="resume is 'never'"):
        run(replace(config, resume="never"))
    with pytest.raises(DataError, match="method: dfpt there, kd here"):
        run(replace(config, method="kd"))
    with pytest.raises(DataError, match="student: cifar:resnet8_s2 there, cifar:resnet14_s2 here"):
        run(replace(config, student="cifar:resnet14_s2"))
    with pytest.raises(DataError, match=r"optim\.lr"):
        run(replace(config, optim=replace(config.optim, lr=0.3)))
    with pytest.raises(DataError, match="expected a checkpoint"):
        run(replace(config, resume=str(tmp_path / "nowhere")))
    (tmp_path / "a/checkpoints/step-1/state.safetensors").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="none of its 1 checkpoints is sound"):
        run(replace(config, max_steps=2))
    (tmp_path / "a/checkpoints/step-1/state.safetensors").write_bytes(
        before[tmp_path / "a/checkpoints/step-1/state.safetensors"]
    )
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_loudly(root, tmp_path, capsys):
    config = make_config(root, "ce", out=str(tmp_path / "a"))
    run(config)
    (tmp_path / "a/checkpoints/step-6/state.safetensors").write_bytes(b"")
    (tmp_path / "a/student.safetensors").unlink()
    assert run(config).step == 6
    assert "damaged" in capsys.readouterr().out


def test_no_teacher_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="dfptkd train-teacher tiny"):
        run(make_config(tmp_path))


def test_the_newest_teacher_of_the_same_data_is_found(root):
    config = make_config(root)
    assert find_teacher(config) == root / "teacher-synthetic-cifar-resnet14_s2-seed0" / (
        "teacher.safetensors"
    )
    other = replace(config, teacher=replace(config.teacher, name="cifar:resnet20_s2"))
    assert find_teacher(other) is None


def test_M44_an_identity_start_raises_the_saturation_alarm(root, tmp_path):
    def kinds(prompt: PromptConfig, out: Path) -> list[str]:
        # A prompt path that learns nothing: only how it starts counts.
        loss = LossConfig(prompt_ce=0.0, prompt_teacher=0.0, prompt_student=0.0)
        run(make_config(root, prompt=prompt, loss=loss, out=str(out)))
        events = (out / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["kind"] for line in events]

    assert "saturation" in kinds(PromptConfig(init="identity"), tmp_path / "identity")


def test_M45_M46_warnings_reach_the_record(root, tmp_path):
    config = make_config(
        root,
        prompt=PromptConfig(fusion=False, r1=1, r2=1.0),
        teacher=TeacherConfig(name="cifar:resnet14_s2", expected_top1=99.9),
        out=str(tmp_path / "a"),
        max_steps=1,
    )
    run(config)
    warnings = " ".join(json.loads((tmp_path / "a/run.json").read_text())["warnings"])
    assert "without fusion" in warnings
    assert "above 10 %" in warnings
    assert "under the recipe's 99.90 %" in warnings
    run(make_config(root, out=str(tmp_path / "b"), max_steps=1))
    assert "fusion" not in " ".join(json.loads((tmp_path / "b/run.json").read_text())["warnings"])


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_intact(root, tmp_path):
    config = make_config(root, "ce", out=str(tmp_path / "a"), optim=OptimConfig(lr=1e30))
    with pytest.raises(NumericError, match="not finite"):
        run(config)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "failed"


def test_a_run_stopped_in_its_last_step_saves_what_it_then_evaluates(root, tmp_path, monkeypatch):
    config = make_config(root, "kd", out=str(tmp_path / "a"))
    with monkeypatch.context() as patch:
        StopAt(patch, 5)
        with pytest.raises(Stopped):
            run(config)
    result = run(config)
    assert result.last
    assert state_of(tmp_path / "a", 6)[1]["progress"]["last"] == result.last
    assert run(config).last == result.last  # finished: read from the checkpoint


def test_an_epoch_that_counts_nothing_ends_the_run(root, tmp_path, monkeypatch):
    """As when the gradients of a scaled loss overflow for good: that is no skip."""
    monkeypatch.setattr(train_module, "SCALE_SEARCH_STEPS", 4)
    monkeypatch.setattr(
        train_module.TrainStep, "_update", lambda *_: torch.zeros((), dtype=torch.bool)
    )
    with pytest.raises(NumericError, match="no step of this epoch counts by step 6"):
        run(make_config(root, "ce", out=str(tmp_path / "a")))


def spoil_steps(monkeypatch, *bad):
    """The images of these steps hold a NaN."""

    class Spoilt(train_module.TrainStep):
        def __call__(self, batch, step):
            plain = self.image_parts
            if step in bad:
                self.image_parts = lambda b: tuple(part * math.nan for part in plain(b))
            super().__call__(batch, step)
            self.image_parts = plain

    monkeypatch.setattr(train_module, "TrainStep", Spoilt)


def test_a_bad_step_is_skipped_said_and_recorded(root, tmp_path, monkeypatch, capsys):
    spoil_steps(monkeypatch, 1)
    run(make_config(root, out=str(tmp_path / "a")))
    assert "1 steps of this epoch skipped" in capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "a/events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "skipped"] == [3]
    assert all(math.isfinite(float(v)) for row in rows(tmp_path / "a") for v in row.values())
    tensors, _ = state_of(tmp_path / "a", 6)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert tensors["student.bn1.num_batches_tracked"] == 5


def test_more_skips_than_allowed_stop_the_run(root, tmp_path, monkeypatch):
    spoil_steps(monkeypatch, 1, 2)
    config = make_config(root, out=str(tmp_path / "a"), step=StepConfig(max_skips=1))
    with pytest.raises(NumericError, match=r"2 steps.*--step\.max-skips 1"):
        run(config)
    run(replace(config, out=str(tmp_path / "b"), step=StepConfig(max_skips=2)))


def test_M21_the_mixture_control_runs_without_prompt_modules(root, tmp_path):
    config = make_config(root, loss=LossConfig(mixture_control=True), out=str(tmp_path / "a"))
    run(config)
    tensors, _ = state_of(tmp_path / "a", 6)
    assert not [name for name in tensors if name.startswith("prompt.")]
    assert "loss/student_prompt" in rows(tmp_path / "a")[0]


def test_a_second_signal_leaves_at_once(root, tmp_path):
    """The first asks, the second ends the process without saving."""
    code = f"""
import os, signal, time
from dfptkd.engine import train as t
from tests_config import make_config
last = {str(tmp_path / "a/checkpoints/step-3")!r}
original = t.TrainStep.__call__
def call(self, batch, step):
    original(self, batch, step)
    if step == 3:
        while not os.path.isdir(last):  # written beside the steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
t.TrainStep.__call__ = call
t.run(make_config({str(root)!r}, "ce", out={str(tmp_path / "a")!r}))
"""
    (tmp_path / "tests_config.py").write_text(Path(__file__).read_text())
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert [p.name for p in (tmp_path / "a/checkpoints").glob("step-*")] == ["step-3"]


def test_deterministic_runs_give_the_same_bits(root, tmp_path):
    for name in ("a", "b"):
        run(make_config(root, out=str(tmp_path / name), deterministic=True))
    assert_same_end(tmp_path / "a", tmp_path / "b", 6)
    torch.use_deterministic_algorithms(False)
