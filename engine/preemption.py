"""A request to stop, taken between two steps.

The handler only sets a flag: the loop stops after the step it is in, saves and leaves with exit
code 75. A second signal leaves at once, with the previous checkpoint intact.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def number(self) -> int:
        """The signal's number, 0 for none."""
        return 0 if self.signal is None else int(self.signal)

    def ask_for_hangup(self) -> None:
        """As SIGHUP would, if nothing has asked before."""
        if self.signal is None:
            self.signal = signal.SIGHUP

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a `StopRequest` for as long as the context lasts.

    Outside the main thread Python takes no signals, and the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
