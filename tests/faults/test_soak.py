"""Many kills and stops in a row (row 33): DFPTKD_SOAK_CYCLES of them, 20 if it is not set.

`make soak` does 200.
"""

import json
import os
import random

import pytest
from injectors import differences, in_child, metric_rows, tiny_config, train
from training_faults import random_moment, stop_and_go_on

from dfptkd.engine.checkpoint import newest_checkpoint

CYCLES = int(os.environ.get("DFPTKD_SOAK_CYCLES", "20"))
STEPS_A_CYCLE = 6
SPAN_S = 0.25  # within which a cycle is cut: some steps, with what they save


def names(out):
    """What lies in a run folder, but for events, and the end of TensorBoard's own file name."""
    found = {str(path.relative_to(out)) for path in out.rglob("*")}
    return sorted(name.split(".tfevents.")[0] for name in found - {"events.jsonl"})


def test_row_33_kills_at_random_moments_end_in_the_state_of_a_run_without(tmp_path):
    steps = STEPS_A_CYCLE * CYCLES
    config = {"epochs": steps // 4, "checkpoint_steps": 2, "eval_every": 5, "checkpoint_every": 3}
    whole, killed = (tiny_config(tmp_path / name, **config) for name in ("whole", "killed"))
    assert in_child(train, whole, folder=tmp_path).code == 0
    rng = random.Random(CYCLES)
    handles, codes, reached = len(os.listdir("/proc/self/fd")), [], set()
    while len(codes) < CYCLES:
        ended = in_child(train, killed, random_moment(rng, SPAN_S), folder=tmp_path)
        assert ended.code in (0, 75, -9, -15), ended.output  # -15: before there was a handler
        codes.append(ended.code)
        if (tmp_path / "killed/checkpoints").exists():
            newest = newest_checkpoint(tmp_path / "killed/checkpoints", pytest.fail)
            reached.add(0 if newest is None else newest.step)
        if ended.code == 0:
            break
    assert codes.count(-9) >= len(codes) // 3
    assert 75 in codes
    assert len(reached) >= len(codes) // 3  # it got on in between
    assert in_child(train, killed, folder=tmp_path).code == 0
    assert differences(tmp_path / "whole", tmp_path / "killed", steps) == []
    assert len(metric_rows(tmp_path / "killed")) >= steps // 4 // 5
    # Nothing has grown: neither files of the run, nor their size, nor what this process holds.
    assert names(tmp_path / "killed") == names(tmp_path / "whole")
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*") if f.is_file() and
                 f.name != "events.jsonl") for n in ("whole", "killed")]  # fmt: skip
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert (tmp_path / "killed/events.jsonl").stat().st_size < 300 * (len(codes) + 5)
    assert len(os.listdir("/proc/self/fd")) <= handles + 5
    print(f"{len(codes)} cycles: {codes.count(-9)} killed, {codes.count(75)} stopped")


def test_row_33_control_a_lost_generator_or_leftover_shows(tmp_path):
    """What is compared above tells a run that was seeded otherwise, and a file too many."""
    for name, seed in (("a", 0), ("b", 1)):
        assert in_child(train, tiny_config(tmp_path / name, seed=seed), folder=tmp_path).code == 0
    assert "tensor student.conv1.weight" in differences(tmp_path / "a", tmp_path / "b", 8)
    before = names(tmp_path / "a")
    (tmp_path / "a/checkpoints/.step-9.tmp-0").mkdir()
    assert names(tmp_path / "a") != before


def test_row_33_stopping_and_going_on_in_one_process_holds_on_to_nothing(tmp_path):
    config = tiny_config(tmp_path / "a", epochs=6)
    result = tmp_path / "counts.json"
    ended = in_child(stop_and_go_on, config, 10, str(result), folder=tmp_path)
    assert ended.code == 0, ended.output
    counts = json.loads(result.read_text())
    assert len(counts) == 10
    assert counts[2:] == [counts[2]] * 8  # descriptors, threads, children
