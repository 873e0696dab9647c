"""Runs that are killed (rows 1, 2, 8): what is on disk carries them to the same end."""

import json
import random
from pathlib import Path

import pytest
from injectors import (
    KILL_POINTS,
    STEPS_PER_EPOCH,
    Kill,
    WholeSaves,
    crash_everywhere,
    differences,
    in_child,
    listing,
    save_second_again,
    save_second_again_carelessly,
    save_third,
    save_third_aside,
    tiny_config,
    train,
    two_checkpoints,
    write_teacher,
)

from dfptkd.engine import run_state
from dfptkd.engine.checkpoint import load_checkpoint, newest_checkpoint, remove_leftovers
from dfptkd.engine.train import run


def events(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "epochs", "kills"), [("ce", 6, 20), ("kd", 2, 4), ("dfpt", 2, 4)]
)
def test_row_1_killed_at_random_points_a_run_ends_where_it_would_have(
    tmp_path, method, epochs, kills
):
    write_teacher(tmp_path)
    end = epochs * STEPS_PER_EPOCH
    whole, killed = (tiny_config(tmp_path / n, method, epochs=epochs) for n in ("whole", "killed"))
    assert in_child(train, whole, folder=tmp_path).code == 0
    rng = random.Random(f"{method} {epochs}")
    # A run gets past a point only if it is killed later than its last checkpoint: in order.
    steps = sorted(rng.randint(1, end) for _ in range(kills))
    died = 0
    for step in steps:
        point = rng.choice(KILL_POINTS[: 2 if step % STEPS_PER_EPOCH else None])
        ended = in_child(train, killed, Kill(step, point), folder=tmp_path)
        if ended.code == 0:
            break  # the last kill came after the last save, and the run had only to end
        assert ended.code in (-9, 0), ended.output
        died += 1
        newest = newest_checkpoint(tmp_path / "killed/checkpoints", pytest.fail)
        done = 0 if newest is None else newest.step
        # no more work lost than a checkpoint's interval, and that of the one being written
        assert step - done <= 2 * STEPS_PER_EPOCH
    assert died >= kills * 3 // 4
    assert in_child(train, killed, folder=tmp_path).code == 0
    assert differences(tmp_path / "whole", tmp_path / "killed", end) == []
    assert sum(e["kind"] == "resumed" for e in events(tmp_path / "killed")) >= 1


def test_row_1_control_a_lost_momentum_shows(tmp_path, monkeypatch):
    """Negative control: with a part of the state not restored the ends differ."""
    whole, killed = (tiny_config(tmp_path / name) for name in ("whole", "killed"))
    assert in_child(train, whole, folder=tmp_path).code == 0
    ended = in_child(train, killed, WholeSaves(), Kill(6, "after"), folder=tmp_path)
    assert ended.code == -9
    monkeypatch.setattr(run_state, "restore_optimizer", lambda *_: None)
    run(killed)
    assert "tensor student.conv1.weight" in differences(tmp_path / "whole", tmp_path / "killed", 8)


def crash_points(tmp_path, act):
    """Run folders in which `act` has crashed, each at another call, and one where it has not."""
    result = tmp_path / "found.json"
    ended = in_child(
        crash_everywhere, two_checkpoints, act, str(tmp_path / "c"), str(result), folder=tmp_path
    )
    assert ended.code == 0, ended.output
    found = json.loads(result.read_text())
    return [Path(folder) for folder in found["crashed"]], Path(found["through"])


@pytest.mark.parametrize(
    ("act", "value"), [(save_third, 3), (save_third_aside, 3), (save_second_again, 4)]
)
def test_row_2_a_crash_at_any_call_of_a_save_leaves_a_checkpoint(tmp_path, act, value):
    points, through = crash_points(tmp_path, act)
    assert len(points) > 60
    assert newest_checkpoint(through / "checkpoints", pytest.fail).tensors["meter"] == value
    saved = 0
    for out in points:
        remove_leftovers(out)
        newest = newest_checkpoint(out / "checkpoints", pytest.fail)
        assert newest.tensors["student.w"][0, 0] in (2, value), out
        assert newest.step >= 2
        saved += newest.tensors["student.w"][0, 0] == value
        names = {path.name for path in (out / "checkpoints").iterdir()}
        assert names <= {"step-1", "step-2", "step-3", "index.json"}, out
        for name in names - {"index.json"}:  # what was not deleted whole is whole
            load_checkpoint(out / "checkpoints" / name)
    assert 3 < saved < len(points)


def test_row_2_control_leftovers_and_a_careless_saver_show(tmp_path):
    """Negative controls: without the clearing there is rubbish; delete-then-rename loses a step."""
    lost, rubbish = 0, 0
    for out in crash_points(tmp_path, save_second_again_carelessly)[0]:
        rubbish += any(".tmp-" in path.name for path in (out / "checkpoints").iterdir())
        newest = newest_checkpoint(out / "checkpoints", lambda _: None)
        lost += newest.step < 2
    assert lost > 0
    assert rubbish > 10


def test_row_8_resumed_twice_finished_and_in_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("whole", "empty"):
        assert in_child(train, tiny_config(tmp_path / name), folder=tmp_path).code == 0
    twice = tiny_config(tmp_path / "twice")
    for step in (6, 7):
        assert in_child(train, twice, Kill(step, "after"), folder=tmp_path).code == -9
    assert in_child(train, twice, folder=tmp_path).code == 0
    for name in ("empty", "twice"):
        assert differences(tmp_path / "whole", tmp_path / name, 8) == []
    before = listing(tmp_path / "twice")
    ended = in_child(train, twice, folder=tmp_path)
    assert ended.code == 0
    assert "already finished at step 8" in ended.output
    assert listing(tmp_path / "twice") == before
