"""What is around a run: terminal, logs, other runs, the system's settings (rows 27 to 30)."""

import errno
import fcntl
import json
import os
import pty
import socket
import threading
import time
from pathlib import Path

import pytest
from injectors import (
    PlainConsole,
    Refuse,
    Stdout,
    Surroundings,
    differences,
    hang_up,
    hold_lock,
    in_child,
    kill_holder,
    listing,
    metric_rows,
    start,
    tiny_config,
    train,
)

from dfptkd.engine import lock as lock_module
from dfptkd.engine import log as log_module
from dfptkd.engine.errors import StorageError, UsageError
from dfptkd.engine.lock import RunLock
from dfptkd.engine.log import GrowingFile, RunLog
from dfptkd.engine.train import run

ROOT = Path(__file__).resolve().parents[2]


def events(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def kinds(out):
    return [event["kind"] for event in events(out)] if (out / "events.jsonl").exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has happened to."""
    root = tmp_path_factory.mktemp("whole")
    assert in_child(train, tiny_config(root / "whole"), folder=root).code == 0
    return root / "whole"


# Row 27: nobody listens --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closed", "absent", "broken pipe"])
def test_row_27_a_lost_stdout_changes_nothing(tmp_path, whole, kind):
    ended = in_child(train, tiny_config(tmp_path / "a"), Stdout(kind), folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    assert differences(whole, tmp_path / "a", 8) == []
    assert kinds(tmp_path / "a").count("terminal") == (0 if kind == "absent" else 1)
    assert kinds(whole).count("terminal") == 0  # negative control


def test_row_27_control_a_plain_console_ends_the_run(tmp_path):
    faults = (PlainConsole(), Stdout("broken pipe"))
    assert in_child(train, tiny_config(tmp_path / "a"), *faults, folder=tmp_path).code != 0
    assert not (tmp_path / "a/student.safetensors").exists()


def test_row_27_a_terminal_that_hangs_up_under_the_bar_changes_nothing(tmp_path):
    main, side = pty.openpty()
    process = start(hang_up, os.ttyname(side), str(tmp_path / "a"))
    seen = b""
    while b"images/s" not in seen:
        seen += os.read(main, 1000)
    os.close(side)
    os.close(main)
    process.join(30)
    assert process.exitcode == 0
    assert kinds(tmp_path / "a") == ["terminal"]
    assert [row["step"] for row in metric_rows(tmp_path / "a")] == ["100"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_row_27_tensorboard_that_cannot_be_written_is_given_up(tmp_path, whole, number):
    no_folder = Refuse("mkdir", number, "/tensorboard")
    ended = in_child(train, tiny_config(tmp_path / "a"), no_folder, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert ended.output.count("tensorboard: no longer written") == 1
    assert kinds(tmp_path / "a").count("tensorboard") == 1
    assert differences(whole, tmp_path / "a", 8) == []


def test_row_27_tensorboard_that_fails_later_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its thread dies of the error
    log = RunLog(tmp_path, ["epoch", "step"], None)

    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = log._tensorboard.file_writer.event_writer._async_writer._writer
    writer.write = refuse
    for step in range(1, 5):
        log.row({"epoch": 1.0, "step": step, "loss": 0.5})
    log.close()
    assert capsys.readouterr().out.count("no longer written (No space left on device)") == 1
    assert kinds(tmp_path) == ["tensorboard"]
    assert [row["step"] for row in metric_rows(tmp_path)] == ["1", "2", "3", "4"]


def test_row_27_log_files_on_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, ["epoch", "step"], None)
    log.row({"epoch": 1.0, "step": 1})
    half_written(monkeypatch, log_module)
    log.row({"epoch": 2.0, "step": 2})
    log.event("note", "x")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step", "1,1"]
    monkeypatch.undo()
    log.row({"epoch": 3.0, "step": 3})
    log.event("note", "y")
    log.close()
    assert [row["step"] for row in metric_rows(tmp_path)] == ["1", "2", "3"]
    assert [e["message"] for e in events(tmp_path) if e["kind"] == "note"] == ["x", "y"]
    said = capsys.readouterr().out
    assert said.count("metrics.csv: could not be written (No space left on device)") == 1


def half_written(monkeypatch, module):
    """Every append writes half of its text, and then the disk is full."""
    original = open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", **options):
        file = original(path, mode, **options)
        return Half(file) if "a" in mode else file

    monkeypatch.setattr(module, "open", opened, raising=False)


# Row 28: two runs on one folder ------------------------------------------------------------------


def test_row_28_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    out, ready = tmp_path / "run", tmp_path / "ready"
    holder = start(hold_lock, str(out), str(ready))
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(UsageError) as refused, RunLock(out):
        pass
    assert f"{out}: in use by process " in str(refused.value)
    assert f" on {socket.gethostname()} since " in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (out / ".lock").exists()
    kill_holder(holder)
    assert (out / ".lock").exists()  # left behind, and so is its forked child, for a while
    with RunLock(out):
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert not out.exists()  # nothing was put into it


def test_row_28_two_runs_in_one_process(tmp_path):
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        with pytest.raises(UsageError, match="in use by process"), RunLock(tmp_path / "a"):
            pass
        (tmp_path / "a/kept").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "kept"]


@pytest.mark.parametrize("text", ["", "{", "[]", "[1, 2]", '{"pid": 1}', "\xff" * 5, "[" * 9**5])
def test_row_28_a_lock_file_that_says_nothing(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="in use by another process"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_row_28_many_at_once_and_one_at_a_time(tmp_path, monkeypatch):
    """Whoever removes the file while another one waits in front of it does not let two in."""
    inside, most, taken = [0], [0], [0]

    def visit():
        for _ in range(60):
            try:
                with RunLock(tmp_path / "a"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    time.sleep(0.0005)
                    inside[0] -= 1
            except UsageError:
                time.sleep(0.0003)

    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert most[0] == 1
    assert taken[0] > 20


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_row_28_where_locks_do_not_work_it_warns_once_and_goes_on(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    said = []
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1
    assert "locks do not work here" in said[0]


def test_row_28_a_folder_that_cannot_be_made_is_a_refusal_of_the_disk(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be locked"), RunLock(tmp_path / "file/run"):
        pass


# Row 29: the system's settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        Surroundings(zone="Asia/Kathmandu"),
        Surroundings(encoding="ascii"),
        Surroundings(encoding="iso-8859-1"),
        Surroundings(umask=0o077),
        Surroundings(clock_s=-3600.0),
        Surroundings(clock_s=1e6),
    ],
    ids=str,
)
def test_row_29_the_systems_settings_change_nothing(tmp_path, whole, around):
    ended = in_child(train, tiny_config(tmp_path / "a"), around, folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "finished: " in ended.output
    assert differences(whole, tmp_path / "a", 8) == []
    mode = (tmp_path / "a/metrics.csv").stat().st_mode & 0o777
    assert mode == 0o666 & ~around.umask
    assert "terminal" not in kinds(tmp_path / "a")


def test_row_29_paths_with_spaces_and_unicode(tmp_path, whole):
    folder = tmp_path / "späte Läufe ❄ [1]"
    folder.mkdir()
    for steps in (4, None):  # and resumed there
        config = tiny_config(folder / "a run", max_steps=steps)
        assert in_child(train, config, folder=tmp_path).code == 0
    found = differences(whole, folder / "a run", 8)
    assert found == []


def test_row_29_the_source_tree_is_only_read(tmp_path):
    def sources():
        found = listing(ROOT / "engine") | listing(ROOT / "kernels") | listing(ROOT / "recipes")
        return {k: v for k, v in found.items() if "__pycache__" not in k} | {
            p.name: "" for p in ROOT.iterdir() if not p.name.startswith(".")
        }

    before = sources()
    run(tiny_config(tmp_path / "a", max_steps=1))
    assert sources() == before


# Row 30: logs after a crash ----------------------------------------------------------------------


def test_row_30_a_log_cut_at_any_byte_goes_on_whole(tmp_path):
    columns = ["epoch", "step", "loss/total"]
    log = RunLog(tmp_path, columns, None)
    for step in (4, 8, 12):
        log.row({"epoch": step / 4, "step": step, "loss/total": 1 / step})
        log.event("note", f"at {step}", step)
    log.close()
    logs = [tmp_path / name for name in ("metrics.csv", "events.jsonl")]
    texts = [path.read_bytes() for path in logs]
    starts = [text[:-1].rfind(b"\n") + 1 for text in texts]
    for cut in range(max(len(t) - s for t, s in zip(texts, starts, strict=True))):
        for path, text, begin in zip(logs, texts, starts, strict=True):
            path.write_bytes(text[: begin + cut])
        log = RunLog(tmp_path, columns, 12)  # the checkpoint of step 12 was there
        log.row({"epoch": 4.0, "step": 16, "loss/total": 0.1})
        log.event("note", "at 16", 16)
        log.close()
        steps = [row["step"] for row in metric_rows(tmp_path)]
        assert steps in (["4", "8", "16"], ["4", "8", "12", "16"])
        assert all(None not in row.values() and None not in row for row in metric_rows(tmp_path))
        assert [e["step"] for e in events(tmp_path)] in ([4, 8, 16], [4, 8, 12, 16])
    assert steps == ["4", "8", "12", "16"]  # the last cut was none


def test_row_30_rows_and_events_after_the_checkpoint_are_cut(tmp_path):
    for start_step in (None, 8, 8):
        log = RunLog(tmp_path, ["epoch", "step"], start_step)
        if start_step:
            log.event("resumed", "from step 8", 8)
        for step in range(12 if start_step else 4, 17, 4):
            log.row({"epoch": step / 4, "step": step})
            log.event("note", "x", step)
        log.close()
    assert [row["step"] for row in metric_rows(tmp_path)] == ["4", "8", "12", "16"]
    assert [(e["kind"], e["step"]) for e in events(tmp_path)] == [
        ("note", 4), ("note", 8), ("resumed", 8), ("resumed", 8), ("note", 12), ("note", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rubbish", [b"\0\0\0\n", b"1,2,3,4,5\r\n", b"\xff\xfe\n", b'"' * 200_000 + b"\n", b"x,y\n"]
)
def test_row_30_lines_that_are_none_of_ours_are_left_out(tmp_path, rubbish):
    for name, lines in (
        ("metrics.csv", [b"epoch,step\r\n", b"1,4\r\n", b"2,8\r\n"]),
        ("events.jsonl", [b'{"step": 4, "kind": "a"}\n', b'{"step": 8, "kind": "b"}\n']),
    ):
        (tmp_path / name).write_bytes(lines[0] + lines[1] + rubbish + b"".join(lines[2:]))
    RunLog(tmp_path, ["epoch", "step"], 8).close()
    assert [row["step"] for row in metric_rows(tmp_path)] == ["4", "8"]
    assert [e["step"] for e in events(tmp_path)] == [4, 8]


def test_row_30_a_rewrite_that_is_refused_loses_no_row(tmp_path, monkeypatch):
    log = RunLog(tmp_path, ["epoch", "step"], None)
    log.row({"epoch": 1.0, "step": 4})
    log.close()
    before = (tmp_path / "metrics.csv").read_bytes()
    monkeypatch.setattr(
        "dfptkd.engine.files.flush", lambda _: (_ for _ in ()).throw(OSError(28, ""))
    )
    with pytest.raises(StorageError):
        RunLog(tmp_path, ["epoch", "step"], 4)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_row_30_a_growing_file_whose_folder_has_gone_keeps_its_lines(tmp_path):
    file = GrowingFile(tmp_path / "gone" / "events.jsonl")
    assert isinstance(file.append("1\n"), OSError)
    (tmp_path / "gone").mkdir()
    assert file.append("2\n") is None
    assert file.path.read_text() == "1\n2\n"
