"""Disks that refuse or crawl, and files that are not what was written (rows 15, 16, 18, 32)."""

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from injectors import (
    DISK_ERRORS,
    NoSpace,
    Refuse,
    SizeLimit,
    in_child,
    listing,
    save_third,
    save_third_aside,
    state_of_step,
    tensors_of,
    tiny_config,
    train,
    two_checkpoints,
    with_faults,
    write_teacher,
)
from training_faults import NoRetries, UntriedStorage

from dfptkd.engine import checkpoint as checkpoint_module
from dfptkd.engine import train as train_module
from dfptkd.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_index,
    save_checkpoint,
    seconds_to_write,
)
from dfptkd.engine.errors import DataError, StorageError
from dfptkd.engine.files import write_atomically
from dfptkd.engine.train import Progress, run

# Row 15: the disk refuses ------------------------------------------------------------------------

CALLS_OF_A_SAVE = ("mkdir", "open", "fsync", "rename", "save_file", "write_text")


@pytest.mark.parametrize("act", [save_third, save_third_aside])
@pytest.mark.parametrize("number", DISK_ERRORS)
def test_row_15_a_refused_save_leaves_the_earlier_checkpoints(tmp_path, act, number):
    for call in CALLS_OF_A_SAVE:
        out = tmp_path / call
        two_checkpoints(out)
        before = listing(out)
        fault = Refuse(call, DISK_ERRORS[number], "step-3")
        ended = in_child(with_faults, act, out, (fault,), folder=tmp_path)
        assert ended.code == StorageError.exit_code, ended.output
        message = f"step-3: the checkpoint could not be written: {os.strerror(fault.number)}"
        assert message in ended.output
        assert listing(out) == before, call  # no temporary folder either


@pytest.mark.parametrize("size", [0, 20, 200])
def test_row_15_a_limit_on_file_size_is_a_refusal(tmp_path, size):
    two_checkpoints(tmp_path / "a")
    before = listing(tmp_path / "a")
    ended = in_child(with_faults, save_third, tmp_path / "a", (SizeLimit(size),), folder=tmp_path)
    assert ended.code == StorageError.exit_code
    assert "step-3: the checkpoint could not be written: " in ended.output
    assert "File too large" in ended.output
    assert listing(tmp_path / "a") == before
    ended = in_child(with_faults, save_third, tmp_path / "a", (SizeLimit(10**6),), folder=tmp_path)
    assert ended.code == 0  # negative control: enough room


def test_row_15_space_is_asked_for_before_anything_is_written(tmp_path):
    two_checkpoints(tmp_path / "a")
    before = listing(tmp_path / "a")
    size = sum(t.nbytes for t in tensors_of(3).values()) + len(
        json.dumps(state_of_step(3), indent=1)
    )
    needed = int(1.2 * size)
    faults = (NoSpace(needed - 1), Refuse("mkdir", errno.EIO, ".tmp"))
    ended = in_child(with_faults, save_third, tmp_path / "a", faults, folder=tmp_path)
    assert ended.code == StorageError.exit_code
    assert f"{needed:,} bytes needed, {needed - 1:,} free" in ended.output
    assert listing(tmp_path / "a") == before
    enough = (NoSpace(needed),)
    assert in_child(with_faults, save_third, tmp_path / "a", enough, folder=tmp_path).code == 0


def test_row_15_training_that_cannot_save_leaves_with_5_and_its_last_checkpoint(tmp_path):
    config = tiny_config(tmp_path / "a", epochs=3, on_storage_error="stop")
    full = Refuse("save_file", errno.ENOSPC, "step-8")
    ended = in_child(train, config, full, folder=tmp_path)
    assert ended.code == StorageError.exit_code
    assert "step-8: the checkpoint could not be written: No space left on device" in ended.output
    assert "Traceback" not in ended.output
    assert newest_checkpoint(tmp_path / "a/checkpoints", pytest.fail).step == 4
    assert in_child(train, config, folder=tmp_path).code == 0


def test_row_15_the_finished_student_is_refused_in_one_line(tmp_path):
    ended = in_child(train, tiny_config(tmp_path / "a"), SizeLimit(200_000), folder=tmp_path)
    assert ended.code == StorageError.exit_code
    assert "Traceback" not in ended.output


def test_row_15_a_refusal_that_passes_is_tried_again(tmp_path, monkeypatch):
    refuse_flush(monkeypatch, 2)
    said = []
    writer = CheckpointWriter(tmp_path, 2, warn=said.append, retry_after=(0.01, 0.01))
    writer.save(tensors_of(1), state_of_step(1), is_best=True)
    writer.finish()
    assert load_checkpoint(tmp_path / "step-1").step == 1
    assert [line.rpartition("; ")[2] for line in said] == ["trying again in 0.01 s"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "index.json"}


def test_row_15_after_the_last_attempt_the_error_is_told_once(tmp_path, monkeypatch):
    refuse_flush(monkeypatch, 3)
    writer = CheckpointWriter(tmp_path, 2, warn=lambda _: None, retry_after=(0.01, 0.01))
    writer.save(tensors_of(1), state_of_step(1), is_best=True)
    while (error := writer.poll()) is None:
        pass
    assert isinstance(error, StorageError)
    assert writer.poll() is None
    writer.finish()
    writer.save(tensors_of(2), state_of_step(2), is_best=True)  # the disk works again
    writer.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2"]


def test_row_15_a_disk_that_stays_read_only_is_not_waited_for(tmp_path, monkeypatch):
    refuse_flush(monkeypatch, 1, errno.EROFS)
    writer = CheckpointWriter(tmp_path, 2, warn=pytest.fail, retry_after=(60.0,))
    writer.save(tensors_of(1), state_of_step(1), is_best=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        writer.finish()


def test_a_save_holds_what_was_true_when_it_was_asked_for(tmp_path, monkeypatch):
    """Tensors and state may change at once; a second save waits for the first."""
    gate, running = threading.Event(), []
    original = checkpoint_module.save_file

    def slow(tensors, path):
        running.append(path)
        assert gate.wait(10)
        original(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", slow)
    writer = CheckpointWriter(tmp_path, 2)
    tensors, state = tensors_of(1), state_of_step(1, progress={"best": {}})
    tensors["tied"] = tensors["student.w"].t()  # the same memory, column-major
    writer.save(tensors, state, is_best=True)
    for tensor in tensors.values():
        tensor.add_(7)
    state["progress"]["best"]["x"] = 1
    assert writer.poll() is None
    threading.Timer(0.2, gate.set).start()
    writer.save(tensors_of(2), state_of_step(2), is_best=False)
    assert len(running) <= 2
    writer.finish()
    first, second = (load_checkpoint(tmp_path / f"step-{n}") for n in (1, 2))
    assert first.state["progress"] == {"best": {}}
    assert torch.equal(first.tensors["student.w"], torch.ones(4, 3))
    assert torch.equal(first.tensors["tied"], torch.ones(3, 4))
    assert torch.equal(second.tensors["meter"], torch.tensor(2.0, dtype=torch.float64))
    assert read_index(tmp_path) == {"last": "step-2", "best": "step-1"}


def test_a_failed_deletion_is_a_warning(tmp_path, monkeypatch):
    two_checkpoints(tmp_path)
    said = []

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", lambda p, **k: k or refuse(p))
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, tensors_of(3), state_of_step(3), keep=1, is_best=True, warn=said.append)
    assert load_checkpoint(folder / "step-3").step == 3
    assert len(said) == 2
    assert "could not be deleted: Permission denied" in said[0]


def refuse_flush(monkeypatch, times, number=errno.EIO):
    left, original = [times], checkpoint_module.flush

    def flush(path):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        original(path)

    monkeypatch.setattr(checkpoint_module, "flush", flush)


def test_row_15_an_atomic_write_takes_its_temporary_file_away(tmp_path):
    (tmp_path / "a.json").write_text("before")

    def half(path):
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"a\.json: could not be written: No space left"):
        write_atomically(tmp_path / "a.json", half)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "before"}


# Row 16: files that are not what was written -----------------------------------------------------

FILES = ("state.safetensors", "state.json", "manifest.json")


def damages(content: bytes):
    """Every truncation to a tenth, and one flipped bit in (at most) 400 bytes all over the file."""
    for tenth in range(10):
        yield content[: len(content) * tenth // 10]
    yield content[:-1]
    yield content + b"\0"
    yield content + b"\n"
    for place in range(0, len(content), max(1, len(content) // 400)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place * 7 % 8)
        yield bytes(flipped)
    yield content.replace(b" ", b"\t", 1)  # equal as JSON
    yield content.replace(b"\n", b" ", 1)


@pytest.mark.parametrize("name", FILES)
def test_row_16_every_damage_of_every_file_is_found_and_passed_over(tmp_path, name):
    two_checkpoints(tmp_path)
    folder = tmp_path / "checkpoints"
    file = folder / "step-2" / name
    content = file.read_bytes()
    found = {damaged for damaged in damages(content) if damaged != content}
    assert len(found) > 100
    for damaged in found:
        file.write_bytes(damaged)
        said = []
        assert newest_checkpoint(folder, said.append).step == 1
        assert len(said) == 1
        assert "falling back to the previous checkpoint" in said[0]
        assert "\n" not in said[0]
    file.write_bytes(content)
    assert newest_checkpoint(folder, pytest.fail).step == 2  # negative control


@pytest.mark.parametrize("name", FILES)
def test_row_16_missing_and_foreign_files_are_found(tmp_path, name):
    two_checkpoints(tmp_path)
    file = tmp_path / "checkpoints/step-2" / name
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match=f"expected a checkpoint of a run: missing {name}"):
        load_checkpoint(file.parent)
    file.mkdir()
    with pytest.raises(DataError, match="expected a checkpoint of a run: Is a directory"):
        load_checkpoint(file.parent)
    file.rmdir()
    file.write_bytes(content)
    (file.parent / "extra.pt").touch()
    with pytest.raises(DataError, match=r"unexpected extra\.pt"):
        load_checkpoint(file.parent)
    (file.parent / "extra.pt").rename(file.parent / ".nfs0001")  # a network file system's
    assert load_checkpoint(file.parent).step == 2


def test_row_16_with_no_sound_checkpoint_nothing_is_started(tmp_path):
    config = tiny_config(tmp_path / "a")
    assert in_child(train, replace(config, max_steps=4), folder=tmp_path).code == 0
    file = tmp_path / "a/checkpoints/step-4/state.json"
    file.write_bytes(file.read_bytes()[:-1])
    before = listing(tmp_path / "a")
    ended = in_child(train, config, folder=tmp_path)
    assert ended.code == DataError.exit_code
    assert "none of its 1 checkpoints is sound" in ended.output
    assert listing(tmp_path / "a") == before


def forge(folder: Path, state: object) -> Path:
    """A checkpoint whose manifest fits, around any state."""
    two_checkpoints(folder)
    path = folder / "checkpoints/step-2"
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").write_text(checkpoint_module._manifest(path))
    return path


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "expected the state of a run, got list"),
        ({}, "step: expected int, got nothing"),
        (state_of_step(2, step="2"), "step: expected int, got str"),
        (state_of_step(2, step=True), "step: expected int, got bool"),
        (state_of_step(3), "step 3: expected that of step-2"),
        (state_of_step(2, progress=None), "progress: expected dict, got NoneType"),
        (state_of_step(2, config=[]), "config: expected dict, got list"),
        (state_of_step(2, alarmed=0), "alarmed: expected bool, got int"),
    ],
    ids=str,
)
def test_row_16_a_state_that_is_json_and_not_ours_is_refused(tmp_path, state, message):
    path = forge(tmp_path, state)
    with pytest.raises(DataError, match=f"^{path}/state.json: {message}"):
        load_checkpoint(path)
    assert newest_checkpoint(path.parent, lambda _: None).step == 1


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',  # beyond the end
        b'{"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [9223372036854775807, 9], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "PICKLE", "shape": [], "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
        b'{"../../w": 3}',
        b"\xff" * 64,
        b"",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("claimed", [None, 2**63 - 1, 10**9])
def test_row_16_headers_that_lie_are_refused_in_one_line(tmp_path, header, claimed):
    path = forge(tmp_path, state_of_step(2))
    size = len(header) if claimed is None else claimed
    (path / "state.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    (path / "manifest.json").write_text(checkpoint_module._manifest(path))
    with pytest.raises(DataError, match="damaged safetensors file") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_row_16_the_index_is_a_hint_only(tmp_path):
    two_checkpoints(tmp_path)
    folder = tmp_path / "checkpoints"
    for text in ("", "{", "[]", '{"last": "step-1", "best": "../../etc"}', '{"last": ["step-2"]}'):
        (folder / "index.json").write_text(text)
        assert newest_checkpoint(folder, pytest.fail).step == 2
        assert set(read_index(folder).values()) <= {"step-1", "step-2"}
    (folder / "index.json").unlink()
    assert read_index(folder) == {"last": "step-2"}


# Row 18: somebody else's checkpoint --------------------------------------------------------------


def test_row_18_another_runs_checkpoint_is_refused_with_the_difference(tmp_path):
    write_teacher(tmp_path)
    config = tiny_config(tmp_path / "a", "kd", max_steps=4)
    assert in_child(train, config, folder=tmp_path).code == 0
    before = listing(tmp_path / "a")
    others = {
        "student: cifar:resnet8_s2 there, cifar:resnet14_s2 here": {"student": "cifar:resnet14_s2"},
        "method: kd there, dfpt here": {"method": "dfpt"},
        "data.num_classes: 4 there, 5 here": {"data": replace(config.data, num_classes=5)},
        "data.image_size: 16 there, 24 here": {"data": replace(config.data, image_size=24)},
        "optim.lr: 0.02 there, 0.1 here": {"optim": replace(config.optim, lr=0.1)},
    }
    for difference, changes in others.items():
        ended = in_child(train, replace(config, **changes), folder=tmp_path)
        assert ended.code == DataError.exit_code, ended.output
        assert difference in ended.output
        assert "Traceback" not in ended.output
    assert listing(tmp_path / "a") == before
    assert in_child(train, replace(config, max_steps=5), folder=tmp_path).code == 0  # control


def test_row_18_tensors_that_do_not_fit_are_named_before_they_are_used():
    checkpoint = Checkpoint(Path("step-2"), tensors_of(2), state_of_step(2))
    checkpoint.check_tensors(tensors_of(5))
    fewer = {"student.w": torch.zeros(4, 3), "optimizer.0.momentum_buffer": torch.zeros(1)}
    checkpoint.check_tensors(fewer, optional=("optimizer", "rng", "meter"))
    for wrong, message in (
        (fewer, r"missing optimizer\.0\.momentum_buffer; unexpected meter, rng\.cpu"),
        (tensors_of(2) | {"student.w": torch.zeros(3, 4)}, r"student\.w \(\[4, 3\], 'float32'\)"),
        (tensors_of(2) | {"meter": torch.zeros(())}, r"meter \(\[\], 'float64'\)"),
    ):
        with pytest.raises(DataError, match=f"^step-2: checkpoint of another run: .*{message}"):
            checkpoint.check_tensors(wrong)


def test_row_18_progress_of_another_version_is_refused(tmp_path):
    path = Path("step-2")
    sound = Checkpoint(path, {}, state_of_step(2, progress={"step": 2, "best": {}}))
    with pytest.raises(DataError, match=r"^step-2: progress of another version: missing last"):
        sound.part("progress", Progress)
    run(tiny_config(tmp_path / "a", max_steps=4))
    real = load_checkpoint(tmp_path / "a/checkpoints/step-4")
    assert real.part("progress", Progress).step == 4


# Row 32 -------------------------------------------------------------------------------------------


def test_row_32_a_disk_that_renames_no_folder_is_refused_before_the_first_step(tmp_path):
    """Control: unlooked at, the run does all its steps and loses them."""
    refuse = Refuse("rename", errno.EXDEV, "step-")
    ended = in_child(train, tiny_config(tmp_path / "a"), refuse, folder=tmp_path)
    assert ended.code == StorageError.exit_code
    assert "no place for checkpoints" in ended.output
    assert "Traceback" not in ended.output
    assert len((tmp_path / "a/metrics.csv").read_text().splitlines()) == 1  # the header
    assert not list((tmp_path / "a/checkpoints").iterdir())
    faults = (refuse, NoRetries(), UntriedStorage())
    control = in_child(train, tiny_config(tmp_path / "b"), *faults, folder=tmp_path)
    assert control.code == StorageError.exit_code
    assert len((tmp_path / "b/metrics.csv").read_text().splitlines()) == 3
    assert not list((tmp_path / "b/checkpoints").glob("step-*"))


def test_row_32_what_a_checkpoint_takes_is_judged_by_little(tmp_path, monkeypatch):
    """A disk of 1 MB/s with 50 ms a flush: 200 MB in 200 s and a little."""
    now = [0.0]

    def slow_flush(path):
        now[0] += 0.05 + (path.stat().st_size / 1e6 if path.is_file() else 0.0)

    monkeypatch.setattr(checkpoint_module, "flush", slow_flush)
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    assert seconds_to_write(tmp_path / "new", 200_000_000) == pytest.approx(200.15)
    assert now[0] < 6
    assert seconds_to_write(tmp_path / "new", 0) == pytest.approx(0.15)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("seconds", "trials", "warns"), [((99,) * 3, 3, 1), ((99, 2), 2, 0)])
def test_row_32_slow_storage_is_said_at_the_start_unless_it_was_busy_once(
    tmp_path, monkeypatch, capsys, seconds, trials, warns
):
    found = iter(seconds)
    calls = []
    monkeypatch.setattr(
        train_module, "seconds_to_write", lambda *args: calls.append(args) or next(found)
    )
    run(tiny_config(tmp_path / "a", max_steps=1))
    assert len(calls) == trials
    assert capsys.readouterr().out.count("takes about 99 s there") == warns
    size = (tmp_path / "a/checkpoints/step-1/state.safetensors").stat().st_size
    assert calls[0][1] == pytest.approx(size, rel=0.1)
