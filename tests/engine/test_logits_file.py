"""The file of teacher logits: what was added is read back, and damage costs no more than itself."""

import errno
import multiprocessing
import os

import numpy as np
import pytest

from dfptkd.engine import logits_file
from dfptkd.engine.logits_file import LogitsFile

PLACES, ROW_BYTES = 1000, 12
KEY = {"teacher": "abc", "images": "def"}
NONE = (np.empty(0, np.int64), np.empty((0, ROW_BYTES), np.uint8))


def row(place):
    return np.full(ROW_BYTES, place % 251, np.uint8)


def rows(*places):
    return np.array(places, np.int64), np.stack([row(p) for p in places])


def add(folder, *places, key=KEY):
    """What adding these rows finds to complain about."""
    new = rows(*places) if places else NONE
    return LogitsFile(folder, key, PLACES, ROW_BYTES).exchange(lambda _: None, lambda: new)


def read(folder, key=KEY):
    """Place -> row, and what there was to complain about."""
    found = {}

    def install(block):
        found.update(zip(block[0].tolist(), block[1].copy(), strict=True))

    complaint = LogitsFile(folder, key, PLACES, ROW_BYTES).exchange(install, lambda: NONE)
    return found, complaint


def assert_holds(folder, *places):
    found, _ = read(folder)
    assert sorted(found) == sorted(places)
    assert all((found[p] == row(p)).all() for p in places)


def path_of(folder):
    (path,) = folder.glob("*.logits")
    return path


def test_rows_are_read_back_by_whoever_has_the_key(tmp_path):
    assert add(tmp_path, 3, 1) is None
    assert add(tmp_path, 999) is None
    assert_holds(tmp_path, 1, 3, 999)
    assert read(tmp_path, {**KEY, "teacher": "xyz"}) == ({}, None)
    assert_holds(tmp_path, 1, 3, 999)


def test_many_rows_are_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(logits_file, "BLOCK_ROWS", 7)
    add(tmp_path, *range(20))
    header = len(LogitsFile(tmp_path, KEY, PLACES, ROW_BYTES).header)
    assert path_of(tmp_path).stat().st_size == header + 3 * 40 + 20 * (8 + ROW_BYTES)
    assert_holds(tmp_path, *range(20))


def test_one_who_is_at_work_gets_what_others_have_added(tmp_path):
    ours, seen = LogitsFile(tmp_path, KEY, PLACES, ROW_BYTES), []
    take = lambda block: seen.append(block[0].tolist())  # noqa: E731
    ours.exchange(take, lambda: rows(5))
    add(tmp_path, 6, 7)
    ours.exchange(take, lambda: NONE)
    ours.exchange(take, lambda: NONE)
    assert seen == [[6, 7]]  # its own are not handed back, and nothing comes twice
    path_of(tmp_path).unlink()
    add(tmp_path, 8)
    ours.exchange(take, lambda: rows(9))
    assert seen == [[6, 7], [8]]
    assert_holds(tmp_path, 8, 9)


@pytest.mark.parametrize("cut", [1, 20, 45, 60])
def test_a_torn_block_is_dropped_and_the_rest_stays(tmp_path, cut):
    add(tmp_path, 1, 2)
    add(tmp_path, 3)  # 60 bytes
    path = path_of(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    found, complaint = read(tmp_path)
    assert sorted(found) == [1, 2]
    assert (complaint is None) == (cut == 60)  # just the whole block: nothing to be seen
    assert cut == 60 or "damaged from byte" in complaint
    assert add(tmp_path, 4) is None  # said once
    assert_holds(tmp_path, 1, 2, 4)


@pytest.mark.parametrize("where", ["count", "digest", "places", "row"])
def test_a_changed_byte_never_becomes_a_row(tmp_path, where):
    add(tmp_path, 1, 2)
    path = path_of(tmp_path)
    start = path.stat().st_size
    add(tmp_path, 3)
    add(tmp_path, 4)
    data = bytearray(path.read_bytes())
    data[start + {"count": 3, "digest": 10, "places": 41, "row": 50}[where]] ^= 64
    path.write_bytes(data)
    found, complaint = read(tmp_path)
    assert sorted(found) == [1, 2]
    assert "damaged" in complaint
    add(tmp_path, 3)
    assert_holds(tmp_path, 1, 2, 3)


def test_a_place_beyond_the_table_is_damage_though_its_checksum_holds(tmp_path):
    larger = LogitsFile(tmp_path, KEY, 10 * PLACES, ROW_BYTES)
    larger.exchange(lambda _: None, lambda: rows(PLACES))
    found, complaint = read(tmp_path)
    assert found == {}
    assert "damaged" in complaint


def test_a_foreign_file_is_set_aside(tmp_path):
    path = LogitsFile(tmp_path, KEY, PLACES, ROW_BYTES).path
    path.write_bytes(b"somebody's notes")
    assert "set aside" in add(tmp_path, 1)
    assert_holds(tmp_path, 1)
    assert path.with_suffix(".aside").read_bytes() == b"somebody's notes"


@pytest.mark.parametrize("length", [0, 10, 40])
def test_a_file_cut_within_its_key_begins_anew(tmp_path, length):
    add(tmp_path, 1)
    os.truncate(path_of(tmp_path), length)
    assert add(tmp_path, 2) is None
    assert_holds(tmp_path, 2)
    assert not list(tmp_path.glob("*.aside"))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    add(tmp_path, 1)

    class Full(logits_file.FileIO):
        def write(self, data):
            if len(data) <= 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:30])  # it takes a part first

    size = path_of(tmp_path).stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(logits_file, "FileIO", Full)
        with pytest.raises(OSError, match="No space left"):
            add(tmp_path, 2)
    assert path_of(tmp_path).stat().st_size == size
    add(tmp_path, 3)
    assert_holds(tmp_path, 1, 3)


def test_a_lock_that_is_never_released_is_an_error_not_a_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(logits_file, "LOCK_SECONDS", 0.05)
    ours = LogitsFile(tmp_path, KEY, PLACES, ROW_BYTES)
    with ours._locked(), pytest.raises(BlockingIOError):
        add(tmp_path, 1)
    assert add(tmp_path, 1) is None


def _add_alone(folder, first, barrier):
    ours = LogitsFile(folder, KEY, PLACES, ROW_BYTES)
    barrier.wait()
    for place in range(first, first + 40):
        ours.exchange(lambda _: None, lambda place=place: rows(place))


def test_processes_that_add_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_add_alone, args=(tmp_path, 100 * i, barrier)) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert_holds(tmp_path, *(100 * i + j for i in range(3) for j in range(40)))
