"""Values that no option means, whatever it is: not a number, beyond 64 bits, empty text."""

from __future__ import annotations

import math
import os
import re
from typing import Any

_BITS = 63
_HOME = re.compile(r"~[\w.-]+(/|$)")


def fault_of_value(value: Any) -> str | None:
    """What is wrong with a value, after the option's name: "must be …"; None of any other.

    Args:
        value: a number, text, a list or a mapping, in which all entries are looked at.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"must be a number of at most {_BITS} bits, got one of {value.bit_length():,}"
    if isinstance(value, str):
        return _fault_of_text(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(fault_of_value, value)), None)
    return None


def _fault_of_text(text: str) -> str | None:
    if not text:
        return "must not be empty: give a value, or leave the option out"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "must be text of whole characters, got half of one (\\ud800 to \\udfff alone)"
    if "\0" in text:
        return "must not have a null character, which no path and no name has"
    if _HOME.match(text) and os.path.expanduser(text) == text:
        return f"must not begin with the home of a user that is not on this machine, got {text!r}"
    return None
