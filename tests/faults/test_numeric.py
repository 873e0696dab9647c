"""Steps that are not finite, one or many, and alarms that stop nothing (rows 11-14, 23, 26).

A bad step in one rank of two: tests/engine/test_distributed.py; fused kernels that are wrong (25):
tests/engine/test_kernel_choice.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from injectors import (
    STEPS_PER_EPOCH,
    Kill,
    differences,
    in_child,
    tiny_config,
    train,
    write_teacher,
)
from training_faults import (
    Drift,
    LittleMemory,
    NeverBack,
    Record,
    Signal,
    Spoil,
    Unexplained,
    in_ranks,
)

from dfptkd.engine import step as step_module
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
)
from dfptkd.engine.config import LossConfig, PromptConfig, StepConfig
from dfptkd.engine.errors import Stopped
from dfptkd.engine.methods.dfpt import TERMS
from dfptkd.engine.train import run


def events(out):
    if not (out / "events.jsonl").exists():  # nothing has happened
        return []
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def kinds(out):
    return [event["kind"] for event in events(out)]


# Row 11 -------------------------------------------------------------------------------------------


def spoil_logits(step, value):
    hook = step.method.student.register_forward_hook(lambda m, i, logits: logits * value)
    return hook.remove


def spoil_term(step, value):
    losses = step.method.losses

    def spoilt(*args):
        output = losses(*args)
        output.terms[step.method.term_names[-1]] = torch.tensor(value)
        output.total = output.total + value  # its gradient stays finite
        return output

    step.method.losses = spoilt
    return lambda: setattr(step.method, "losses", losses)


def spoil_gradient(step, value):
    param = step.params[-1]  # of the student or, with a prompt path, of that

    def hook(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return param.register_hook(hook).remove


POINTS = [
    (spoil, value)
    for spoil in (spoil_logits, spoil_term, spoil_gradient)
    for value in (math.nan, math.inf)
]


def everything(step):
    """All that a step may move, as it is now."""
    found = dict(step.method.trained_state())
    found |= optimizer_tensors(step.optimizer)
    found |= {f"ema.{k}": v for k, v in step.ema.state_dict().items()}
    found["meter"] = step.meter.sums
    found["scale"] = torch.tensor(step.scaler.get_scale())
    return {k: v.clone() for k, v in found.items()}


def spoil_steps(monkeypatch):
    """Each of POINTS in a step of its own, from step 1 on; what each has changed."""
    plain, changed = train_module.TrainStep.__call__, {}

    def call(step, batch, number):
        if not 1 <= number <= len(POINTS):
            return plain(step, batch, number)
        spoil, value = POINTS[number - 1]
        mend, before = spoil(step, value), everything(step)
        plain(step, batch, number)
        mend()
        after = everything(step)
        changed[number] = [k for k in before if not torch.equal(before[k], after[k])]
        return None

    monkeypatch.setattr(train_module.TrainStep, "__call__", call)
    return changed


@pytest.mark.parametrize(
    ("method", "precision"),
    [("ce", "fp32"), ("kd", "bf16"), ("dfpt", "fp32"), ("dfpt", "bf16"), ("dfpt_plus", "fp32")],
)
def test_row_11_a_bad_step_changes_no_bit_and_is_said(tmp_path, monkeypatch, method, precision):
    write_teacher(tmp_path)
    changed = spoil_steps(monkeypatch)
    budgets = StepConfig(max_skips_in_a_row=9)
    config = tiny_config(tmp_path / "a", method, step=budgets, precision=precision)
    run(config)
    assert changed == {number: [] for number in range(1, 7)}
    said = [e for e in events(tmp_path / "a") if e["kind"] == "skipped"]
    assert [(e["step"], e["message"].split()[0]) for e in said] == [(4, "3"), (8, "3")]
    state = load_checkpoint(tmp_path / "a/checkpoints/step-8").tensors
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


def test_row_11_control_without_the_gate_all_is_lost(tmp_path, monkeypatch):
    changed = spoil_steps(monkeypatch)
    monkeypatch.setattr(
        step_module.Gate, "judge", lambda gate, *_: torch.ones((), dtype=torch.bool)
    )
    run(tiny_config(tmp_path / "a"))
    assert all(changed.values())
    state = load_checkpoint(tmp_path / "a/checkpoints/step-8").tensors
    assert not state["student.conv1.weight"].isfinite().any()


def test_row_11_bad_images_in_one_rank_of_two_are_one_skip_for_both(tmp_path):
    config = tiny_config(tmp_path / "a")
    for ended in in_ranks(config, Spoil(2, 3, rank=1), folder=tmp_path):
        assert ended.code == 0, ended.output
    state = load_checkpoint(tmp_path / "a/checkpoints/step-8").tensors
    assert state["student.bn1.num_batches_tracked"] == 6
    assert [e["message"].split()[0] for e in events(tmp_path / "a") if e["kind"] == "skipped"] == [
        "2"
    ]


# Row 12 -------------------------------------------------------------------------------------------


def test_row_12_nan_for_good_goes_back_once_and_then_ends_with_what_was_seen(tmp_path):
    write_teacher(tmp_path)
    config = tiny_config(tmp_path / "a", "dfpt", epochs=5)
    faults = (Spoil(10, 99), Record(str(tmp_path / "seen")))
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 4, ended.output
    assert "networks back to those of step 8" in ended.output
    assert kinds(tmp_path / "a").count("rewind") == 1
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "failed"
    # The last good one is intact, and nothing that was saved is not finite.
    newest = newest_checkpoint(tmp_path / "a/checkpoints", pytest.fail)
    assert newest.step >= 8
    for path in checkpoints(tmp_path / "a/checkpoints"):
        tensors = load_checkpoint(path).tensors.values()
        assert all(t.isfinite().all() for t in tensors if t.is_floating_point())
    # The dump names the step, its samples as they were really taken, the seeds, every term.
    (dump,) = (tmp_path / "a").glob("numeric-*.json")
    assert f"{dump} says what was seen" in ended.output
    found = json.loads(dump.read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    lines = Path(f"{tmp_path / 'seen'}-rank0").read_text().splitlines()
    taken = [json.loads(line) for line in lines]
    assert found["step"] == taken[-1][0] >= 15
    (own,) = found["by_rank"]
    assert own["samples"] == taken[-1][1]
    assert own["names"][0] == f"sample {own['samples'][0]}"
    assert (found["seed"], found["order_seed"], found["epoch"]) == (0, 0, found["step"] // 4)
    assert own["terms"].keys() == {"total", *TERMS}
    assert set(own["terms"].values()) == {"nan"}


def test_row_12_of_two_ranks_both_end_and_the_dump_has_both(tmp_path):
    config = tiny_config(tmp_path / "a", epochs=5)
    faults = (Spoil(6, 99, rank=1), Record(str(tmp_path / "seen")))
    ranks = in_ranks(config, *faults, folder=tmp_path)
    assert [ended.code for ended in ranks] == [4, 4], ranks[0].output
    assert sum(ended.output.count("dfptkd: ") for ended in ranks) == 1
    (dump,) = (tmp_path / "a").glob("numeric-*.json")
    found = json.loads(dump.read_text())
    for rank, own in enumerate(found["by_rank"]):
        last = Path(f"{tmp_path / 'seen'}-rank{rank}").read_text().splitlines()[-1]
        assert json.loads(last)[:2] == [found["step"], own["samples"]]
    terms = [own["terms"]["total"] for own in found["by_rank"]]
    assert terms[1] == "nan"
    assert math.isfinite(terms[0])


def test_row_12_control_unwatched_a_run_of_nan_goes_on_to_its_end(tmp_path):
    config = tiny_config(tmp_path / "a", epochs=3)
    assert in_child(train, config, NeverBack(), Spoil(4, 99), folder=tmp_path).code == 0


LONG = {"epochs": 2, "checkpoint_steps": 4}


def long_config(out):
    """32 steps an epoch, looked at every 16."""
    config = tiny_config(out, **LONG)
    return replace(config, data=replace(config.data, limit=256), global_batch=8)


def test_row_12_a_streak_beyond_the_budget_goes_back_once_and_then_finishes(tmp_path):
    """In the midst of an epoch; the checkpoints within do not push out the one to go back to."""
    config = long_config(tmp_path / "a")
    bad = Spoil(6, 15)
    ended = in_child(train, config, bad, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "10 steps of this epoch skipped by step 16" in ended.output
    assert "networks back to those of step 4" in ended.output
    assert kinds(tmp_path / "a").count("rewind") == 1
    last = load_checkpoint(tmp_path / "a/checkpoints/step-64")
    assert last.state["progress"]["rewinds"] == 1
    assert last.tensors["student.bn1.num_batches_tracked"] == 64 - 10 - 2  # 4 and 5 are undone
    # Killed and stopped in between it comes to the same end.
    again = replace(config, out=str(tmp_path / "b"))
    assert in_child(train, again, bad, Kill(12, "after"), folder=tmp_path).code == -9
    assert in_child(train, again, bad, Signal(13), folder=tmp_path).code == 75
    assert in_child(train, again, bad, Kill(23, "after"), folder=tmp_path).code == -9
    assert in_child(train, again, bad, folder=tmp_path).code == 0
    assert kinds(tmp_path / "b").count("rewind") == 1
    assert differences(tmp_path / "a", tmp_path / "b", 64) == []


def test_row_12_without_a_checkpoint_to_go_back_to_the_run_ends(tmp_path):
    config = replace(long_config(tmp_path / "a"), checkpoint_steps=None)
    ended = in_child(train, config, Spoil(6, 15), folder=tmp_path)
    assert ended.code == 4, ended.output
    assert (tmp_path / "a/numeric-15.json").is_file()


# Row 13 -------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """A scaler at work on a CPU, whose scale doubles after three good steps."""
    monkeypatch.setattr(step_module, "compute_precision", lambda *_: "fp16")
    scaler = torch.amp.GradScaler

    def small(device, enabled):
        return scaler(device, init_scale=1024.0, growth_interval=3, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", small)


def overflow(monkeypatch, *steps):
    """An infinite gradient in these steps; returns the scale after each step."""
    plain, scales = train_module.TrainStep.__call__, {}

    def call(step, batch, number):
        mend = spoil_gradient(step, math.inf) if number in steps else lambda: None
        plain(step, batch, number)
        mend()
        scales[number] = step.scaler.get_scale()

    monkeypatch.setattr(train_module.TrainStep, "__call__", call)
    return scales


@pytest.mark.usefixtures("fp16_on_cpu")
def test_row_13_the_scale_halves_grows_and_survives_a_stop(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        scales = overflow(patch, 1, 2)
        run(tiny_config(tmp_path / "whole", epochs=3))
    assert [scales[n] for n in range(9)] == [1024, 512, 256, 256, 256, 512, 512, 512, 1024]
    assert "skipped" not in kinds(tmp_path / "whole")  # how a scale is found is no fault
    state = load_checkpoint(tmp_path / "whole/checkpoints/step-12").state
    assert state["scaler"]["scale"] == scales[11]
    # Stopped between: scale and growth counter go on where they were.
    config = tiny_config(tmp_path / "a", epochs=3)
    with monkeypatch.context() as patch:
        overflow(patch, 1, 2)
        Stop(patch, 4)
        with pytest.raises(Stopped):
            run(config)
    run(config)
    assert differences(tmp_path / "whole", tmp_path / "a", 12) == []


@pytest.mark.usefixtures("fp16_on_cpu")
def test_row_13_control_a_scale_that_is_not_restored_shows(tmp_path, monkeypatch):
    run(tiny_config(tmp_path / "whole", epochs=3))
    config = tiny_config(tmp_path / "a", epochs=3)
    with monkeypatch.context() as patch:
        Stop(patch, 4)
        with pytest.raises(Stopped):
            run(config)
    monkeypatch.setattr(torch.amp.grad_scaler.GradScaler, "load_state_dict", lambda *_: None)
    run(config)
    assert "state scaler" in differences(tmp_path / "whole", tmp_path / "a", 12)


class Stop:
    """A request to stop after a step (from 0), in this process."""

    def __init__(self, monkeypatch, step):
        original = train_module.StopVote.after_step
        done = [0]

        def after_step(vote):
            if done[0] == step:
                vote.request.signal = train_module.signal.SIGTERM
            done[0] += 1
            original(vote)

        monkeypatch.setattr(train_module.StopVote, "after_step", after_step)


# Row 14 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e3, 1.0])
def test_row_14_a_loss_spike_that_is_finite_is_an_event_and_not_the_end(
    tmp_path, monkeypatch, factor
):
    """Control: without the spike there is no event."""
    plain, number = train_module.TrainStep._image_parts, [0]

    def spiking(step, batch):
        number[0] += 1
        spikes = number[0] == 4 * STEPS_PER_EPOCH - 1
        if spikes:
            list(step.method.student.parameters())[-2].data.mul_(factor)  # the last layer's
        return plain(step, batch)

    monkeypatch.setattr(train_module.TrainStep, "_image_parts", spiking)
    run(tiny_config(tmp_path / "a", epochs=4))
    assert "skipped" not in kinds(tmp_path / "a")
    assert kinds(tmp_path / "a").count("loss_spike") == (factor > 1)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "finished"


def test_row_14_saturation_is_an_event_and_not_the_end(tmp_path, monkeypatch):
    write_teacher(tmp_path)
    still = LossConfig(prompt_ce=0.0, prompt_teacher=0.0, prompt_student=0.0)
    config = tiny_config(tmp_path / "a", "dfpt", prompt=PromptConfig(init="identity"), loss=still)
    run(config)
    assert kinds(tmp_path / "a").count("saturation") == 1
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "finished"
    found = {"top1": 90.0, "top5": 100.0}  # control: a teacher that knows more
    monkeypatch.setattr(train_module.Evaluator, "teacher", lambda _: found)
    run(tiny_config(tmp_path / "b", "dfpt"))
    assert "saturation" not in kinds(tmp_path / "b")


# Row 23 -------------------------------------------------------------------------------------------


def test_row_23_a_step_that_does_not_fit_names_one_that_does(tmp_path):
    config = tiny_config(tmp_path / "a")
    ended = in_child(train, config, LittleMemory(step=8), folder=tmp_path)
    assert ended.code == 5, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("dfptkd: ")]
    # The first forward pass is the one that the choice of kernels looks at.
    assert "out of memory in choosing kernels (CUDA out of memory. Tried to" in line
    assert "--accumulate 2 (each step in 2 parts of 8 images)" in line
    assert "Traceback" not in ended.output
    fits = replace(config, accumulate=2)
    assert in_child(train, fits, LittleMemory(step=8), folder=tmp_path).code == 0
    control = replace(config, out=str(tmp_path / "b"))
    ended = in_child(train, control, LittleMemory(step=8), Unexplained(), folder=tmp_path)
    assert ended.code == 1
    assert "Traceback" in ended.output


def test_row_23_an_evaluation_that_does_not_fit_names_one_that_does(tmp_path):
    config = tiny_config(tmp_path / "a")
    ended = in_child(train, config, LittleMemory(evaluation=32), folder=tmp_path)
    assert ended.code == 5, ended.output
    assert "--eval-batch 32" in ended.output
    fits = replace(config, eval_batch=32)
    assert in_child(train, fits, LittleMemory(evaluation=32), folder=tmp_path).code == 0


# Row 26 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "dfpt", "dfpt_plus"])
def test_row_26_a_teacher_that_moves_by_a_bit_is_said(tmp_path, method):
    write_teacher(tmp_path)
    for name, faults in (("a", [Drift(4)]), ("b", [])):
        config = tiny_config(tmp_path / name, method)
        ended = in_child(train, config, *faults, folder=tmp_path)
        assert ended.code == 0, ended.output
        assert ("teacher_drift" in kinds(tmp_path / name)) == bool(faults)
