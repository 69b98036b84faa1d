"""Text that came from files or users, as a terminal or a report may show it."""

from __future__ import annotations

import unicodedata
from typing import Any


def printable(text: str) -> str:
    """`text` without what terminals obey or readers cannot see: control, direction, format signs.

    These are written as Python writes them, `\\x1b` say; newlines and spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(letter if _is_seen(letter) else _as_escape(letter) for letter in text)


def one_line(text: Any) -> str:
    """`text` without line breaks and runs of spaces, and printable."""
    return printable(" ".join(str(text).split()))


def _is_seen(letter: str) -> bool:
    return letter.isprintable() or letter == "\n" or unicodedata.category(letter) == "Zs"


def _as_escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
