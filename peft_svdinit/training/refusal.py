"""What a command or recipe says of a wrong input, with options named as they are typed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..files import WrongKind, one_line

# Everything else is a fault of the program, and leaves its traceback.
REFUSALS = (ValueError, OSError, ImportError, WrongKind)


@contextmanager
def refusals_in_one_line(options: Sequence[Any], says: str = "error") -> Iterator[None]:
    """Within the context, a wrong input ends the process with one line instead of a traceback.

    Args:
        options: the dataclasses of the options, or their instances; see `as_typed`.
        says: what the line begins with.

    Raises:
        SystemExit: with the line.
    """
    try:
        yield
    except REFUSALS as error:
        message = as_typed(one_line(error), options)
        raise SystemExit(f"{says}: {message}") from error


def as_typed(message: str, options: Sequence[Any]) -> str:
    """A message whose arguments are named as options are typed: `--lora_r` for `lora_r`.

    Renamed are the first word of the message where it is the subject ("rank must be", "seed: "),
    and names with an underscore, or before "=", anywhere; any other word may be one of the
    sentence. Where functions know an option by other names, its dataclass says so in `_known_as`, a
    mapping of the option to these names.
    """
    typed = {name: f"--{option}" for name, option in _names(options).items()}
    names = "|".join(map(re.escape, typed)) or "(?!)"
    compound = "|".join(re.escape(name) for name in typed if "_" in name) or "(?!)"
    subject = rf"^(?:{names})(?=:|=|,| (?:must|needs|and|does|is|belongs|exclude)\b)"
    outside = r"(?<![\w./('\"-])"
    anywhere = rf"{outside}(?:(?:{compound})\b(?![./-])|(?:{names})(?==))"
    return re.sub(f"{subject}|{anywhere}", lambda found: typed[found[0]], message)


def _names(options: Sequence[Any]) -> dict[str, str]:
    """The option that every name in a message means; of several, one that was given."""
    absent: dict[str, str] = {}
    others: dict[str, str] = {}
    own: dict[str, str] = {}
    for group in options:
        known_as = getattr(group, "_known_as", {})
        for entry in fields(group):
            if not entry.init:
                continue
            if not isinstance(group, type) and getattr(group, entry.name) is None:
                absent[entry.name] = entry.name
                continue
            own[entry.name] = entry.name
            others |= dict.fromkeys(known_as.get(entry.name, ()), entry.name)
    return absent | others | own
