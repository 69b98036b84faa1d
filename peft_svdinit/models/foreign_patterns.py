"""Regular expressions of a stranger: broken ones, and such as never end, are refused unmatched."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..files import shortened

_SECONDS = 5.0
# Lists of layers are long and simple; what can backtrack is written by people.
_LONGEST, _LONGEST_INTRICATE = 1 << 20, 10_000
# An escaped character and a set count as one character. Where a set ends is guessed too early
# rather than too late: what is left of it makes an expression look more intricate than it is.
_ONE_CHARACTER = re.compile(r"\\.|\[[^\]]*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+{]|(?<!\()\?")
_TRIAL = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
if hasattr(signal, "alarm"):
    signal.alarm(seconds)  # Ends this, too, where whoever waits for it is killed.
for number, (pattern, whole) in enumerate(patterns):
    print(number, flush=True)
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name) if whole else compiled.match(name)
print(len(patterns))
"""


class Pattern(NamedTuple):
    """One expression.

    Attributes:
        option: which it is the value of, or a key in.
        written: as the configuration has it.
        matched: the same in the form in which it is matched.
        whole: whether it is matched with whole names, not with their beginnings.
    """

    option: str
    written: str
    matched: str
    whole: bool = False


def refuse_unreadable(patterns: Iterable[Pattern], place: str) -> None:
    """Raise ValueError if an expression is none, or longer than any that is meant seriously.

    Args:
        patterns: the expressions.
        place: what the message of an error begins with.
    """
    for pattern in patterns:
        longest = _LONGEST_INTRICATE if _is_intricate(pattern.written) else _LONGEST
        subject = f"{place}{pattern.option}: {shortened(pattern.written)}"
        if len(pattern.written) > longest:
            raise ValueError(f"{subject} has more than {longest:,} characters; list names instead")
        try:
            re.compile(pattern.matched)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{subject} is no regular expression ({error}); correct it") from error


def refuse_endless(patterns: Iterable[Pattern], names: Iterable[str], place: str) -> None:
    """Raise ValueError if an expression takes seconds with names of layers.

    Those that could are tried in a process of their own, which can be ended.

    Args:
        patterns: expressions that can be compiled.
        names: that they are matched with.
        place: what the message of an error begins with.
    """
    intricate = tuple(pattern for pattern in patterns if _is_intricate(pattern.written))
    if not intricate:
        return
    endless = _first_endless(intricate, tuple(sorted(_various(names))))
    if endless is not None:
        raise ValueError(
            f"{place}{endless.option}: {shortened(endless.written)} takes longer than "
            f"{_SECONDS:g} s with the names of the layers, since it can match them in too many "
            "ways; write it without repeats in repeats, or list names instead"
        )


def _is_intricate(expression: str) -> bool:
    """Whether it could take long: not with one repeat of one character, and one group."""
    plain = _ONE_CHARACTER.sub("x", expression)
    return (
        len(_REPEAT.findall(plain)) > 1
        or plain.count("(") > 1
        or re.search(r"\)[*+?{]", plain) is not None
    )


def _various(names: Iterable[str]) -> set[str]:
    """Of names that differ in numbers alone the longest; each too with a letter more, and its
    parent: names that an expression for layers fails with."""
    longest: dict[str, str] = {}
    for name in names:
        kind = re.sub(r"\d+", "0", name)
        if len(name) >= len(longest.get(kind, "")):
            longest[kind] = name
    found = longest.values()
    return {*found, *(f"{name}_" for name in found), *(name.rpartition(".")[0] for name in found)}


@lru_cache(maxsize=64)
def _first_endless(patterns: tuple[Pattern, ...], names: Sequence[str]) -> Pattern | None:
    """The expression that the trial did not come to an end with."""
    if not sys.executable:
        return None  # Of a program that is no interpreter there is no second one.
    matched = [[each.matched, each.whole] for each in patterns]
    given = json.dumps([matched, names, 2 * math.ceil(_SECONDS)])
    trial = [sys.executable, "-I", "-S", "-c", _TRIAL]
    with subprocess.Popen(trial, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(given.encode())
        process.stdin.close()
        process.stdout.readline()  # The time begins with the first expression.
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        begun = [0, *map(int, process.stdout.read().split())][-1]
    return dict(enumerate(patterns)).get(begun)
