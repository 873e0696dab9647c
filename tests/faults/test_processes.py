"""Processes that hang or die, and what they leave (rows 5, 6, 9, 10, 20, 21, 22, 31).

Restart by a launcher, uneven shards: tests/engine/test_distributed.py; what is wrong with data
before a run: tests/engine/data.
"""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from injectors import (
    WholeSaves,
    crash_everywhere,
    differences,
    in_child,
    tiny_config,
    train,
    write_teacher,
)
from safetensors.torch import load_file
from sample_images import write_folder
from training_faults import (
    BlackForLost,
    DieAtModel,
    DrawsOfWorker,
    Forgetful,
    HangInLoader,
    HangInStep,
    HangInWorker,
    HungStatus,
    KillWorker,
    NoWatchdog,
    OrderOfRank,
    RankKill,
    Record,
    ShortGrace,
    Signal,
    Unexplained,
    Vanish,
    copy_run,
    end_of,
    export_weights,
    export_weights_in_place,
    free_port,
    in_ranks,
    on_pictures,
    program,
    rank_of,
    train_with_workers,
)

from dfptkd.engine.checkpoint import load_checkpoint, newest_checkpoint
from dfptkd.engine.cli import main
from dfptkd.engine.config import StepConfig


def newest(out):
    return newest_checkpoint(out / "checkpoints", pytest.fail).step


def impatient(config, *, data=300.0, step=600.0):
    return replace(config, data=replace(config.data, timeout=data), step=StepConfig(timeout=step))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Row 6 --------------------------------------------------------------------------------------------


def test_row_6_a_rank_that_waits_for_data_ends_all_and_names_the_files(tmp_path):
    config = impatient(tiny_config(tmp_path / "a", checkpoint_steps=2), data=1.5, step=20.0)
    started = time.monotonic()
    first, second = in_ranks(config, WholeSaves(), HangInLoader(6, rank=1), folder=tmp_path)
    assert time.monotonic() - started < 15
    assert second.code == 3, second.output
    assert "rank 1: waiting for data has taken more than 1.5 s: the batch of step 6" in (
        second.output
    )
    assert "sample " in second.output
    assert first.code == 1, first.output
    assert "rank 0: another process is gone" in first.output
    assert "in step 6" in first.output
    assert "Traceback" not in first.output + second.output
    assert newest(tmp_path / "a") == 6
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "failed"


def test_row_6_a_rank_that_hangs_in_a_step_ends_and_so_does_who_waits_for_it(tmp_path):
    config = impatient(tiny_config(tmp_path / "a"), step=2.0)
    started = time.monotonic()
    faults = (WholeSaves(), HangInStep(5, rank=1), ShortGrace(1.0))
    first, second = in_ranks(config, *faults, folder=tmp_path)
    assert time.monotonic() - started < 15
    assert (first.code, second.code) == (1, 1), first.output + second.output
    assert "has not answered within --step.timeout 2 s, in step" in first.output
    assert "rank 1: step 5 has taken more than 3 s" in second.output
    assert "Traceback" not in first.output + second.output
    assert newest(tmp_path / "a") == 4
    for ended in in_ranks(config, folder=tmp_path):
        assert ended.code == 0, ended.output


def test_row_6_a_rank_that_dies_before_the_first_step_is_one_line_of_the_other(tmp_path):
    first, second = in_ranks(tiny_config(tmp_path / "a"), DieAtModel(rank=1), folder=tmp_path)
    assert (first.code, second.code) == (1, 9), first.output
    assert "rank 0: another process is gone, or has not answered" in first.output
    assert "Traceback" not in first.output


@pytest.mark.parametrize("rank", [0, 1])
def test_row_6_processes_that_do_not_meet_say_so(tmp_path, rank):
    config = impatient(tiny_config(tmp_path / "a"), step=1.0)
    ended = in_child(rank_of, rank, 2, free_port(), config, folder=tmp_path)
    assert ended.code == 1, ended.output
    assert f"rank {rank}: the 2 processes of the run have not met at 127.0.0.1:" in ended.output
    assert "Traceback" not in ended.output


def test_row_6_control_unwatched_it_hangs(tmp_path):
    config = impatient(tiny_config(tmp_path / "a"), step=2.0)
    faults = (HangInStep(1, rank=1), ShortGrace(1.0), NoWatchdog())
    first, second = in_ranks(config, *faults, folder=tmp_path, wait_s=6)
    assert (first.code, second.code) == (1, 1000)


def test_row_6_a_hanging_data_worker_is_not_left_behind(tmp_path):
    """The run ends and names the file; its workers end with it, the one that hangs too."""
    write_folder(tmp_path / "pictures", train=8)
    config = on_pictures(impatient(tiny_config(tmp_path / "a"), data=1.5), tmp_path / "pictures", 2)
    pids = tmp_path / "pids"
    ended = in_child(train_with_workers, config, HangInWorker(3, str(pids)), folder=tmp_path)
    assert ended.code == 3, ended.output
    assert "waiting for data has taken more than 1.5 s" in ended.output
    assert str(tmp_path / "pictures/train") in ended.output
    time.sleep(0.2)
    found = {int(pid) for pid in pids.read_text().split()}
    assert found
    assert [pid for pid in found if is_alive(pid)] == []


# Rows 5, 9, 22 ------------------------------------------------------------------------------------


def test_row_9_one_two_one_process_take_the_samples_that_one_takes(tmp_path):
    """The whole batch of each step, in its order; two processes end alike, stopped or not."""
    config = tiny_config(tmp_path / "a", "kd")
    write_teacher(tmp_path)
    seen = {name: Record(str(tmp_path / name)) for name in ("alone", "one", "two", "three")}
    whole = replace(config, out=str(tmp_path / "whole"))
    assert in_child(train, whole, seen["alone"], folder=tmp_path).code == 0
    assert in_child(train, config, seen["one"], Signal(1), folder=tmp_path).code == 75
    for ended in in_ranks(config, seen["two"], Signal(4, rank=1), folder=tmp_path):
        assert ended.code == 75, ended.output
    stopped = newest(tmp_path / "a")
    assert in_child(train, config, seen["three"], folder=tmp_path).code == 0

    def batches(name, ranks=1):
        files = [Path(f"{tmp_path / name}-rank{rank}") for rank in range(ranks)]
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [
            (parts[0][0], [sample for part in parts for sample in part[1]])
            for parts in zip(*lines, strict=True)
        ]

    taken = [*batches("one"), *batches("two", 2), *batches("three")]
    assert taken == batches("alone")
    assert len(batches("two", 2)) == stopped - 2 > 0
    ends = [load_checkpoint(tmp_path / n / "checkpoints/step-8") for n in ("whole", "a")]
    a, b = (end.tensors["student.conv1.weight"] for end in ends)
    assert 0 < (a - b).norm() < 0.2 * a.norm()  # BatchNorms saw halves of three batches


def test_row_9_control_an_order_of_each_rank_shows(tmp_path):
    config = tiny_config(tmp_path / "a", max_steps=2)
    seen = {size: Record(str(tmp_path / f"{size}")) for size in (1, 2)}
    alone = replace(config, out=str(tmp_path / "alone"))
    assert in_child(train, alone, seen[1], OrderOfRank(), folder=tmp_path).code == 0
    for ended in in_ranks(config, seen[2], OrderOfRank(), folder=tmp_path):
        assert ended.code == 0, ended.output
    first, second, whole = (
        [json.loads(line)[1] for line in Path(tmp_path / name).read_text().splitlines()]
        for name in ("2-rank0", "2-rank1", "1-rank0")
    )
    assert [a + b for a, b in zip(first, second, strict=True)] != whole
    assert first == [rows[:8] for rows in whole]  # rank 0 has the order of all


def test_row_9_a_batch_that_two_cannot_share_is_refused_with_the_reason(tmp_path):
    config = tiny_config(tmp_path / "a", global_batch=15)
    for ended in in_ranks(config, folder=tmp_path):
        assert ended.code == 2
        assert "expected a multiple of 2" in ended.output


def test_row_5_a_worker_killed_twice_is_gone_on_with_to_the_same_end(tmp_path):
    config = tiny_config(tmp_path / "a", "dfpt")
    write_teacher(tmp_path)
    whole = replace(config, out=str(tmp_path / "whole"))
    for ended in in_ranks(whole, folder=tmp_path):
        assert ended.code == 0, ended.output
    for step in (2, 6):  # undone from the beginning, and from step 4
        codes = [e.code for e in in_ranks(config, RankKill(step, "after"), folder=tmp_path)]
        assert codes == [1, -9]
    for ended in in_ranks(config, folder=tmp_path):
        assert ended.code == 0, ended.output
    assert differences(tmp_path / "whole", tmp_path / "a", 8) == []


def test_row_5_control_a_momentum_that_is_lost_in_between_shows(tmp_path):
    config = tiny_config(tmp_path / "a")
    whole = replace(config, out=str(tmp_path / "whole"))
    for ended in in_ranks(whole, folder=tmp_path):
        assert ended.code == 0, ended.output
    codes = [e.code for e in in_ranks(config, WholeSaves(), RankKill(6, "after"), folder=tmp_path)]
    assert codes == [1, -9]
    for ended in in_ranks(config, Forgetful(), folder=tmp_path):
        assert ended.code == 0, ended.output
    assert "tensor student.conv1.weight" in differences(tmp_path / "whole", tmp_path / "a", 8)


# Rows 10, 20, 21 ----------------------------------------------------------------------------------


def test_row_10_another_number_of_workers_after_a_stop_takes_the_same_batches(tmp_path):
    write_folder(tmp_path / "pictures", train=16)
    config = on_pictures(tiny_config(tmp_path / "a"), tmp_path / "pictures", 2)
    whole = replace(config, out=str(tmp_path / "whole"), data=replace(config.data, workers=0))
    seen = [Record(str(tmp_path / name)) for name in ("alone", "resumed")]
    assert in_child(train_with_workers, whole, seen[0], folder=tmp_path).code == 0
    for workers, faults, code in ((2, [Signal(1)], 75), (0, [Signal(4)], 75), (1, [], 0)):
        now = replace(config, data=replace(config.data, workers=workers))
        ended = in_child(train_with_workers, now, seen[1], *faults, folder=tmp_path)
        assert ended.code == code, ended.output
    a, b = (Path(f"{tmp_path / name}-rank0").read_text() for name in ("alone", "resumed"))
    assert a == b
    assert len(set(a.splitlines())) == 8
    assert set(differences(tmp_path / "whole", tmp_path / "a", 8)) <= {"state config"}


def test_row_10_control_draws_of_each_worker_show(tmp_path):
    write_folder(tmp_path / "pictures", train=16)
    config = on_pictures(tiny_config(tmp_path / "a", max_steps=4), tmp_path / "pictures", 2)
    seen = [Record(str(tmp_path / name)) for name in ("a-seen", "b-seen")]
    for record, workers in zip(seen, (2, 0), strict=True):
        own = replace(config, out=record.path[:-5], data=replace(config.data, workers=workers))
        ended = in_child(train_with_workers, own, record, DrawsOfWorker(), folder=tmp_path)
        assert ended.code == 0, ended.output
    lines = [Path(f"{record.path}-rank0").read_text().splitlines() for record in seen]
    (_, samples, pixels), (_, others, other_pixels) = (
        zip(*map(json.loads, found), strict=True) for found in lines
    )
    assert samples == others
    assert not set(pixels) & set(other_pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_row_20_a_file_that_vanishes_ends_the_run_with_its_name(tmp_path, workers):
    files = write_folder(tmp_path / "pictures", train=16)
    config = on_pictures(tiny_config(tmp_path / "a"), tmp_path / "pictures", workers)
    gone = {str(file): file.read_bytes() for file in files[:9]}
    fault = Vanish(3, paths=tuple(gone))
    ended = in_child(train_with_workers, config, fault, folder=tmp_path)
    assert ended.code == 3, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("dfptkd: ")]
    assert any(file in line for file in gone)
    assert newest(tmp_path / "a") == 4
    assert main(["status", str(tmp_path / "a")]) == 3
    for file, content in gone.items():
        Path(file).write_bytes(content)
    assert in_child(train_with_workers, config, folder=tmp_path).code == 0


def test_row_20_control_a_loader_that_makes_do_ends_as_if_nothing_were(tmp_path):
    files = write_folder(tmp_path / "pictures", train=16)
    config = on_pictures(tiny_config(tmp_path / "a"), tmp_path / "pictures", 0)
    gone = tuple(str(file) for file in files[:9])
    faults = (Vanish(3, paths=gone), BlackForLost())
    ended = in_child(train_with_workers, config, *faults, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "finished" in ended.output


def test_row_21_a_killed_data_worker_is_one_clear_line(tmp_path):
    """Control: what torch says of it is a traceback."""
    write_folder(tmp_path / "pictures", train=32)
    config = on_pictures(tiny_config(tmp_path / "x"), tmp_path / "pictures", 2)
    started = time.monotonic()
    a, b = (
        program(replace(config, out=str(tmp_path / name)), KillWorker(1), *faults)
        for name, faults in (("a", []), ("b", [Unexplained()]))
    )
    ended, control = end_of(a), end_of(b)
    assert time.monotonic() - started < 120  # no hang
    assert ended.code == 3, ended.output
    assert ended.output.count("a process that decodes images has died") == 1
    assert "--data.workers 2" in ended.output
    assert "Traceback" not in ended.output
    assert control.code in (1, 3)  # 3: it died while it handed a batch over


def test_row_6_a_status_that_cannot_be_written_holds_no_watchdog_up(tmp_path):
    """The disk hangs, data and all."""
    config = impatient(tiny_config(tmp_path / "a"), data=1.0)
    faults = (HungStatus(1), HangInLoader(2))
    started = time.monotonic()
    ended = in_child(train, config, *faults, folder=tmp_path)
    assert ended.code == 3, ended.output
    assert "waiting for data has taken more than 1 s" in ended.output
    assert time.monotonic() - started < 12


# Row 31 -------------------------------------------------------------------------------------------


def test_row_31_an_export_that_is_killed_leaves_the_earlier_one_or_the_new_one(tmp_path):
    """Control: a file written in place is lost by a crash in between."""
    assert in_child(train, tiny_config(tmp_path / "run"), folder=tmp_path).code == 0
    first = in_child(export_weights, tmp_path / "run", folder=tmp_path)
    assert first.code == 0, first.output
    earlier = (tmp_path / "run/export/student.safetensors").read_bytes()
    for act, halves in ((export_weights, False), (export_weights_in_place, True)):
        root, result = tmp_path / act.__name__, tmp_path / "found.json"
        prepare = partial(copy_run, str(tmp_path / "run"))
        ended = in_child(crash_everywhere, prepare, act, str(root), str(result), folder=tmp_path)
        assert ended.code == 0, ended.output
        crashed = json.loads(result.read_text())["crashed"]
        assert len(crashed) > 2
        found = [Path(folder, "export/student.safetensors").read_bytes() for folder in crashed]
        assert any(content != earlier for content in found) == halves
    weights = load_file(tmp_path / "run/export/student.safetensors")
    state = load_checkpoint(tmp_path / "run/checkpoints/step-8").tensors
    assert all((state[f"student.{name}"] == weight).all() for name, weight in weights.items())
