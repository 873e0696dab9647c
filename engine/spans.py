"""Names for the parts of a step, for whoever listens: `dfptkd profile` does, a run does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Listener = Callable[[str], AbstractContextManager]
_listener: Listener | None = None


def span(name: str) -> AbstractContextManager:
    """A `with` block whose work is called `name`; costs one comparison where nobody listens."""
    return nullcontext() if _listener is None else _listener(name)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Has `listener` make the context of every span inside the block."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None
