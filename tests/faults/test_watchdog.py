"""The heartbeat and the end of a process that is stuck (row 6), without a run around them."""

import threading
import time

import pytest

from dfptkd.engine import watchdog as watchdog_module
from dfptkd.engine.watchdog import Watchdog

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def ends(monkeypatch):
    """The exit codes with which a watchdog has ended the process; it looks ten times a second."""
    found = []

    def leave(code):
        found.append(code)
        raise SystemExit  # of the watchdog's own thread

    monkeypatch.setattr(watchdog_module.os, "_exit", leave)
    monkeypatch.setattr(watchdog_module, "_LOOK_S", 0.1)
    monkeypatch.setattr(watchdog_module, "_LAST_BEAT_S", 0.2)
    return found


def test_the_heart_beats_with_the_name_of_the_phase(monkeypatch):
    monkeypatch.setattr(watchdog_module, "BEAT_S", 0.05)
    beats = []
    with Watchdog(0, beats.append) as watchdog:
        time.sleep(0.3)
        with watchdog.phase("outer"):
            with watchdog.phase("inner"):
                time.sleep(0.3)
            time.sleep(0.3)
    assert list(dict.fromkeys(beats)) == ["starting", "inner", "outer"]
    count = len(beats)
    time.sleep(0.2)
    assert len(beats) == count  # it ends with its context
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_row_6_a_phase_beyond_its_limit_ends_the_process_and_says_why(ends, capfd):
    beats = []
    watchdog = Watchdog(3, beats.append)
    with watchdog, watchdog.phase("waiting for data", 0.2, lambda: "a.jpg"):
        time.sleep(0.8)
    assert ends == [3]
    said = capfd.readouterr().err
    assert said == "dfptkd: rank 3: waiting for data has taken more than 0.2 s: a.jpg\n"
    assert beats == ["gave up: waiting for data"]


def test_row_6_one_within_its_limit_or_without_one_does_not(ends):
    with Watchdog(0, print) as watchdog:
        for _ in range(4):  # each is a wait of its own
            with watchdog.phase("step", 0.5):
                time.sleep(0.2)
        with watchdog.phase("evaluation"):
            time.sleep(0.8)
    assert ends == []


def test_row_6_neither_a_lost_terminal_nor_a_hanging_disk_holds_the_end_up(ends, monkeypatch):
    class Lost:
        def write(self, text):
            raise OSError("gone")

    monkeypatch.setattr(watchdog_module.sys, "stderr", Lost())
    monkeypatch.setattr(watchdog_module, "BEAT_S", 0.05)
    done = threading.Event()
    started = time.monotonic()
    with Watchdog(0, lambda _: done.wait(10)) as watchdog:
        with watchdog.phase("step", 0.1, exit_code=1):
            while not ends and time.monotonic() - started < 5:
                time.sleep(0.05)
        done.set()
    assert ends == [1]


def test_what_a_process_was_at_when_it_failed():
    watchdog = Watchdog(0, print)
    with pytest.raises(ValueError, match="x"), watchdog.phase("outer"), watchdog.phase("inner"):
        raise ValueError("x")
    assert watchdog.latest == "inner"
