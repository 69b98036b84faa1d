"""JSON that others wrote, parsed strictly: what two readers may take differently is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

# Far beyond any configuration, and far within what recursion over the values can take.
DEEPEST = 100
_TOO_DEEP = f"it is nested deeper than {DEEPEST} objects and lists"


def parsed_json(text: str | bytes, *, constants: bool = False) -> Any:
    """The value of a JSON document.

    Args:
        text: the document; bytes are UTF-8.
        constants: whether NaN and infinities are taken, which JSON does not have and Python writes,
            as transformers does in configurations and in the state of a training.

    Raises:
        ValueError: if it is no JSON or UTF-8, has a key twice in one object, a number that no float
            holds, or is nested too deeply; the message is a sentence without its subject's name.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=None if constants else _refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 ({error})") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if isinstance(value, dict | list):
        _refuse_deep(value)
    if "\\ud" in text.lower():
        _refuse_half_characters(value)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {twice[:80]!r} twice: which one is meant?")
    return found


def _integer(digits: str) -> int:
    _number(digits)  # Python reads an integer of more digits than it prints.
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]}… is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        entries = (each.values() if isinstance(each, dict) else each for each in level)
        level = [entry for each in entries for entry in each if isinstance(entry, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it has half a character (\\ud800 to \\udfff alone)") from error
