"""What to answer to a name that does not exist."""

import difflib
from collections.abc import Iterable

from ..errors import UsageError


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for an unknown name, with the closest known ones, or the first of them."""
    known = sorted(known)
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    shown = [by_lower[match] for match in close]
    if shown:
        return UsageError(f"unknown {kind} {name!r}: did you mean {', '.join(shown)}?")
    some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return UsageError(f"unknown {kind} {name!r}: expected one of {some}")
