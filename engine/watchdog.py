"""A thread that sees whether the run moves: a heartbeat, and an end where it waits for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from .errors import DataError
from .log import complain

BEAT_S = 30.0
_LOOK_S = 0.5


class _Phase(NamedTuple):
    name: str
    since: float
    limit_s: float
    detail: Callable[[], str]


class Watchdog:
    """Context manager: watches what its process is at.

    Args:
        rank: Of this process, for the message.
        beat: Called with the name of the phase twice a minute.
    """

    def __init__(self, rank: int, beat: Callable[[str], None]) -> None:
        self.rank, self.beat = rank, beat
        self._phase = _Phase("starting", time.monotonic(), 0.0, str)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    @contextmanager
    def phase(
        self, name: str, limit_s: float = 0.0, detail: Callable[[], str] = str
    ) -> Iterator[None]:
        """What the process does inside.

        Args:
            name: For people.
            limit_s: Longest that it may take; the process then ends with exit code 3. 0: no limit.
            detail: What to say of it then.
        """
        outer = self._phase
        self._phase = _Phase(name, time.monotonic(), limit_s, detail)
        try:
            yield
        finally:
            self._phase = outer._replace(since=time.monotonic())

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._end.wait(_LOOK_S):
            now, phase = time.monotonic(), self._phase
            if phase.limit_s and now - phase.since > phase.limit_s:
                self._give_up(phase)
            if now - beaten >= BEAT_S:
                beaten = now
                self.beat(phase.name)

    def _give_up(self, phase: _Phase) -> None:
        """The main thread is stuck in a call that nothing interrupts: only the process can end."""
        complain(
            f"rank {self.rank}: {phase.name} has taken more than {phase.limit_s:g} s: "
            f"{phase.detail()}"
        )
        self.beat(f"gave up: {phase.name}")
        sys.stderr.flush()
        os._exit(DataError.exit_code)
