"""Names that a user may misspell: what was meant is guessed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


def guess(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the closest known name, or nothing if none is close."""
    closest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def check_name(argument: str, name: str, known: Collection[str]) -> None:
    """Raise ValueError unless a name is known."""
    if name not in known:
        raise ValueError(
            f"{argument} must be one of {', '.join(known)}, got {name!r}{guess(name, known)}"
        )


def check_names(argument: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise ValueError unless there are names, each of them once and known."""
    check_different(argument, names)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{argument} must be of {', '.join(known)}, got {name!r}{guess(name, known)}"
            )


def check_different(argument: str, given: Sequence[object]) -> None:
    """Raise ValueError unless something is given, and nothing twice."""
    if not given or len(set(given)) < len(given):
        raise ValueError(f"{argument} must be different and at least one, got {list(given)}")
