"""Runs that are asked to stop (rows 3, 4), and checkpoints within epochs (rows 1, 15).

One rank of two under a launcher: tests/engine/test_distributed.py.
"""

import errno
import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest
from injectors import (
    Kill,
    Refuse,
    WholeSaves,
    differences,
    in_child,
    listing,
    tiny_config,
    train,
    write_teacher,
)
from sample_images import write_folder
from training_faults import (
    DefaultSignals,
    NoRetries,
    PatientSignals,
    Signal,
    SlowDisk,
    SlowPictures,
    SlowRefusal,
    SynchronousPoll,
    TermEndsWorker,
    end_of,
    in_ranks,
    on_pictures,
    program,
    train_all_seeds,
)

from dfptkd.engine.checkpoint import checkpoints, newest_checkpoint
from dfptkd.engine.cli import main

END = 8
TORCHRUN = tuple(
    "-m torch.distributed.run --standalone --nproc-per-node=2 "
    "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1".split()
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a teacher and uninterrupted runs: <method>."""
    root = tmp_path_factory.mktemp("whole")
    write_teacher(root)
    for method in ("ce", "dfpt"):
        ended = in_child(train, tiny_config(root / method, method), folder=root)
        assert ended.code == 0, ended.output
    return root


def newest(out):
    return newest_checkpoint(out / "checkpoints", pytest.fail).step


def status(out):
    return json.loads((out / "status.json").read_text())


def kinds(out):
    return [json.loads(line)["kind"] for line in (out / "events.jsonl").read_text().splitlines()]


# Stop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_row_3_a_signal_stops_after_its_step_saved(whole, tmp_path, number, step):
    """In mid-epoch, at its edge, in the last step."""
    write_teacher(tmp_path)
    config = tiny_config(tmp_path / "a", "dfpt" if step == 1 else "ce")
    ended = in_child(train, config, Signal(step, number=number), folder=tmp_path)
    assert ended.code == 75, ended.output
    assert f"stopped by {number.name} at step {step + 1}" in ended.output
    assert newest(tmp_path / "a") == step + 1
    assert (status(tmp_path / "a")["state"], status(tmp_path / "a")["step"]) == (
        "stopped",
        step + 1,
    )
    assert kinds(tmp_path / "a")[-1] == "stopped"
    assert in_child(train, config, folder=tmp_path).code == 0
    assert differences(whole / config.method, tmp_path / "a", END) == []


def test_row_3_control_without_a_handler_the_signal_kills(tmp_path):
    fault = Signal(5)
    config = tiny_config(tmp_path / "a")
    ended = in_child(train, config, WholeSaves(), DefaultSignals(), fault, folder=tmp_path)
    assert ended.code == -signal.SIGTERM
    assert newest(tmp_path / "a") == 4
    assert status(tmp_path / "a")["state"] == "running"


def test_row_3_signals_to_the_launcher_stop_all_ranks_at_one_step(tmp_path):
    """By torchrun, with the launch line of the README; then gone on with by the same two ranks."""
    config = tiny_config(tmp_path / "a", epochs=6)
    fault, started = Signal(5, rank=1, number=int(signal.SIGUSR1), to="launcher"), time.time()
    done = end_of(program(config, fault, launcher=TORCHRUN))
    assert done.code == 1  # torchrun's, whatever its workers left with
    assert main(["status", str(tmp_path / "a"), "--since", str(started)]) == 75
    said = re.findall(r"stopped by SIG\w+ at step (\d+)", done.output)
    assert len(said) == 1, done.output  # rank 0 says it for both
    assert 6 <= int(said[0]) <= 8
    assert newest(tmp_path / "a") == int(said[0])
    assert status(tmp_path / "a")["state"] == "stopped"
    whole = replace(config, out=str(tmp_path / "whole"))
    for run in (config, whole):
        for ended in in_ranks(run, folder=tmp_path):
            assert ended.code == 0, ended.output
    assert differences(tmp_path / "whole", tmp_path / "a", 24) == []


def test_row_3_a_signal_to_the_data_workers_too_still_stops_saved(tmp_path):
    """As a cluster that stops a job sends it to all of its processes, while a batch is awaited."""
    write_folder(tmp_path / "pictures", train=16)
    config = on_pictures(tiny_config(tmp_path / "x"), tmp_path / "pictures", 2)

    def start(name, *faults):
        slow = SlowPictures(0.1)  # 0.8 s a batch
        return program(replace(config, out=str(tmp_path / name)), slow, *faults)

    processes = [
        start("term", Signal(0, to="group")),
        start("int", Signal(0, number=int(signal.SIGINT), to="group")),
        start("control", TermEndsWorker(), Signal(0, to="group")),
    ]
    for name, process, code in zip(("term", "int", "control"), processes, (75, 75, 3), strict=True):
        ended = end_of(process)
        assert ended.code == code, ended.output
        assert any((tmp_path / name).glob("checkpoints/step-*")) == (code == 75)


def test_row_4_a_second_signal_leaves_at_once_with_the_previous_checkpoint(whole, tmp_path):
    """While a slow disk is writing the last one."""
    config = tiny_config(tmp_path / "a")
    faults = (SlowDisk(3.0, step=6), Signal(5, again_after=0.5))
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert newest(tmp_path / "a") == 4
    leftovers = [p.name for p in (tmp_path / "a/checkpoints").iterdir() if ".tmp-" in p.name]
    assert len(leftovers) == 1  # it was in the midst of it
    assert in_child(train, config, folder=tmp_path).code == 0
    assert differences(whole / "ce", tmp_path / "a", END) == []
    assert not [p for p in (tmp_path / "a/checkpoints").iterdir() if ".tmp-" in p.name]


def test_row_4_control_a_patient_handler_waits_for_the_disk(tmp_path):
    faults = (PatientSignals(), SlowDisk(1.0, step=6), Signal(5, again_after=0.3))
    assert in_child(train, tiny_config(tmp_path / "a"), *faults, folder=tmp_path).code == 75
    assert newest(tmp_path / "a") == 6


# Checkpoints within epochs ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 6, 7])
def test_row_1_no_more_steps_are_lost_than_lie_between_checkpoints(whole, tmp_path, step):
    """Every second one, also where an epoch's end is none at which to save."""
    config = tiny_config(tmp_path / "a", checkpoint_steps=2, checkpoint_every=5)
    ended = in_child(train, config, Kill(step + 1, "before"), folder=tmp_path)
    assert ended.code == -9, ended.output
    assert 0 <= step - newest(tmp_path / "a") <= 2 + 1  # one may still have been on its way
    assert in_child(train, config, folder=tmp_path).code == 0
    assert_same_but_for(config, whole / "ce", tmp_path)


def assert_same_but_for(config, expected, tmp_path):
    """As the run of the same steps whose checkpoints lie elsewhere."""
    same = replace(config, out=str(tmp_path / "same"))
    assert in_child(train, same, folder=tmp_path).code == 0
    assert differences(tmp_path / "same", tmp_path / "a", END) == []
    ignored = {"state config"}  # how often to save
    assert set(differences(expected, tmp_path / "a", END)) == ignored


def test_row_1_the_edge_of_an_epoch_is_a_checkpoint_where_its_step_is(tmp_path):
    config = tiny_config(tmp_path / "a", checkpoint_steps=4, checkpoint_every=5, epochs=3)
    assert in_child(train, config, WholeSaves(), Kill(7, "before"), folder=tmp_path).code == -9
    assert newest(tmp_path / "a") == 4
    control = replace(config, out=str(tmp_path / "b"), checkpoint_steps=None)
    assert in_child(train, control, WholeSaves(), Kill(11, "before"), folder=tmp_path).code == -9
    assert newest(tmp_path / "b") <= 8  # the best alone is saved


def test_row_1_checkpoints_by_the_clock(whole, tmp_path):
    config = tiny_config(tmp_path / "a", checkpoint_minutes=1e-6)
    assert in_child(train, config, WholeSaves(), Kill(8, "before"), folder=tmp_path).code == -9
    assert newest(tmp_path / "a") == 7
    assert in_child(train, config, folder=tmp_path).code == 0
    assert_same_but_for(config, whole / "ce", tmp_path)
    control = replace(config, out=str(tmp_path / "b"), checkpoint_minutes=0.0)
    assert in_child(train, control, WholeSaves(), Kill(8, "before"), folder=tmp_path).code == -9
    assert newest(tmp_path / "b") == 4


def test_row_1_several_seeds_at_once_killed_and_gone_on_with(tmp_path):
    write_teacher(tmp_path)
    config = tiny_config(tmp_path / "x", "kd", checkpoint_steps=3)
    config = replace(config, out=None, seeds=(3, 4))
    whole = replace(config, out_root=str(tmp_path / "whole"))
    killed = replace(config, out_root=str(tmp_path / "killed"))
    assert in_child(train_all_seeds, whole, folder=tmp_path).code == 0
    assert in_child(train_all_seeds, killed, Kill(2, "after"), folder=tmp_path).code == -9
    assert in_child(train_all_seeds, killed, Signal(4), folder=tmp_path).code == 75
    assert in_child(train_all_seeds, killed, Kill(8, "before"), folder=tmp_path).code == -9
    assert in_child(train_all_seeds, killed, folder=tmp_path).code == 0
    for seed in (3, 4):
        a, b = (tmp_path / name / f"tiny-kd-seed{seed}" for name in ("whole", "killed"))
        assert set(differences(a, b, END)) <= {"state config"}, seed  # out_root
        assert newest(b) == END


# Saves that fail in the background ---------------------------------------------------------------


def test_row_15_a_save_that_fails_is_said_and_the_next_one_counts(whole, tmp_path):
    config = tiny_config(tmp_path / "a")
    faults = (NoRetries(), Refuse("save_file", errno.EIO, "step-4"))
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert kinds(tmp_path / "a").count("checkpoint_failed") == 1
    assert ended.output.count("Input/output error") == 1
    assert [p.name for p in checkpoints(tmp_path / "a/checkpoints")] == ["step-8"]
    assert differences(whole / "ce", tmp_path / "a", END) == []


@pytest.mark.parametrize(("poll", "code"), [((), 0), ((SynchronousPoll(),), 5)])
def test_row_15_one_that_fails_when_the_next_is_due_is_not_the_last(tmp_path, poll, code):
    """Control: without waiting for it, its error ends a run whose checkpoints are all there."""
    config = tiny_config(tmp_path / "a", checkpoint_steps=3)
    faults = (NoRetries(), SlowRefusal("save_file", errno.EIO, "step-6"), *poll)
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == code, ended.output
    assert newest(tmp_path / "a") == END


def test_row_15_a_run_that_is_to_stop_then_leaves_with_5(tmp_path):
    config = tiny_config(tmp_path / "a", on_storage_error="stop", epochs=4)
    faults = (NoRetries(), Refuse("save_file", errno.EIO, "step-8"))
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 5, ended.output
    assert ended.output.count("step-8: the checkpoint could not be written") == 1
    assert newest(tmp_path / "a") == 4
    assert status(tmp_path / "a")["state"] == "failed"
    assert in_child(train, config, folder=tmp_path).code == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_row_15_the_last_checkpoint_must_succeed(tmp_path, stopped):
    """Of a run that ends, and of one that is asked to stop."""
    config = tiny_config(tmp_path / "a")
    step = 6 if stopped else 8
    faults = [NoRetries(), Refuse("save_file", errno.EIO, f"step-{step}")]
    faults += [Signal(5)] if stopped else []
    before = in_child(train, replace(config, max_steps=4), folder=tmp_path)
    assert before.code == 0
    os.unlink(tmp_path / "a/student.safetensors")
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 5, ended.output
    assert newest(tmp_path / "a") == 4
    assert status(tmp_path / "a")["state"] == "failed"
    assert not (tmp_path / "a/student.safetensors").exists()


def test_a_finished_run_is_no_longer_asked(tmp_path):
    """Nor is anything of it written anew."""
    config = tiny_config(tmp_path / "a")
    assert in_child(train, config, folder=tmp_path).code == 0
    before = listing(tmp_path / "a")
    assert in_child(train, config, Signal(0), folder=tmp_path).code == 0
    assert listing(tmp_path / "a") == before
