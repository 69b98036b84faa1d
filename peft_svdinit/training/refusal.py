"""What a command or recipe says of a wrong input, with options named as they are typed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..files import WrongKind, one_line


class Unfinished(RuntimeError):
    """A stage of a run left something out, and its message says what to do about it.

    The run is at fault, or its machine; other RuntimeErrors are faults of the program.
    """


# Everything else is a fault of the program, and leaves its traceback.
REFUSALS = (ValueError, OSError, ImportError, WrongKind, Unfinished)


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


@contextmanager
def refused_as(subject: str) -> Iterator[None]:
    """Within the context, whatever another library raises becomes a ValueError about `subject`.

    For a call into that library with the user's own input and nothing of ours to get wrong: its
    KeyErrors and TypeErrors speak of that input.

    Args:
        subject: what the message begins with.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject}: {_of_library(error)}") from error


@contextmanager
def said_of(argument: str, option: str) -> Iterator[None]:
    """Within the context, refusals of an argument are about the option that it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(argument, option, 1)) from error


def _of_library(error: Exception) -> str:
    cause = error.__cause__ or error
    # The message of these is a key, or nothing.
    alone = isinstance(cause, ValueError | OSError | RuntimeError | ImportError) and str(cause)
    return str(cause) if alone else f"{type(cause).__name__}: {cause}".removesuffix(": ")


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
