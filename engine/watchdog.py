"""A thread that sees whether the run moves: a heartbeat, and an end where it waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NamedTuple

from .errors import DataError

BEAT_S = 30.0
_LOOK_S = 0.5
_LAST_BEAT_S = 5.0  # longest wait for a disk that may be what hangs


class _Phase(NamedTuple):
    name: str
    since: float
    limit_s: float
    detail: Callable[[], str]
    exit_code: int


class Watchdog:
    """Context manager: watches what its process is at.

    Args:
        rank: Of this process, for the message.
        beat: Called with the name of the phase twice a minute.
    """

    def __init__(self, rank: int, beat: Callable[[str], None]) -> None:
        self.rank, self.beat = rank, beat
        self._phase = _Phase("starting", time.monotonic(), 0.0, str, 1)
        self.latest = ""
        """What the process was at when an error ended a phase; else empty."""
        self._end = threading.Event()
        # Two, since a disk that hangs would hold up the one that beats.
        self._threads = [
            threading.Thread(target=task, name="watchdog", daemon=True)
            for task in (self._watch, self._beat)
        ]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def phase(
        self,
        name: str,
        limit_s: float = 0.0,
        detail: Callable[[], str] = str,
        exit_code: int = DataError.exit_code,
    ) -> Iterator[None]:
        """What the process does inside.

        Args:
            name: For people.
            limit_s: Longest that it may take; the process then ends. 0: no limit.
            detail: What to say of it then.
            exit_code: How it ends then.
        """
        outer = self._phase
        self._phase = _Phase(name, time.monotonic(), limit_s, detail, exit_code)
        try:
            yield
        except BaseException:
            self.latest = self.latest or name  # the innermost one
            raise
        finally:
            self._phase = outer._replace(since=time.monotonic())

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_S):
            phase = self._phase
            if phase.limit_s and time.monotonic() - phase.since > phase.limit_s:
                self._give_up(phase)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            self.beat(self._phase.name)

    def _give_up(self, phase: _Phase) -> None:
        """The main thread is stuck in a call that nothing interrupts: only the process can end."""
        with suppress(Exception):  # whatever fails here, the process is to end
            print(
                f"dfptkd: rank {self.rank}: {phase.name} has taken more than {phase.limit_s:g} s: "
                f"{phase.detail()}",
                file=sys.stderr,
                flush=True,
            )
        last = threading.Thread(target=self.beat, args=[f"gave up: {phase.name}"], daemon=True)
        last.start()
        last.join(_LAST_BEAT_S)
        for child in multiprocessing.active_children():  # data workers may hang themselves
            child.kill()
        os._exit(phase.exit_code)
