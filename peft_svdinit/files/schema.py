"""What the entries of a configuration must be, and one sentence where they are not."""

from __future__ import annotations

import copy
import json
import re
from typing import Annotated, Any, TypeVar

import msgspec

Schema = TypeVar("Schema")
# No more than other programs can hold.
_LARGEST = 2**53
Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
"""An integer of at least 0."""
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
"""An integer of at least 1, a size say."""
Amount = Annotated[float, msgspec.Meta(ge=0)]
"""A number of at least 0."""
ClassName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_]\w*\Z")]
"""What may stand in code as it is."""

_SHOWN = 80
_STEP = re.compile(r"\.(?P<key>\w+)|\[(?P<index>\d+)\]|(?P<entry>\[\.\.\.\])")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_BOUNDS = {
    " matching regex ": " matching ",
    " >= ": " of at least ",
    " <= ": " of at most ",
    " > ": " above ",
    " < ": " below ",
}


def validated(value: Any, schema: type[Schema], place: str = "") -> Schema:
    """A value of JSON as its schema, a `msgspec.Struct` of the keys that are read.

    Other keys may be there and hold anything. Nothing is converted, but that an integer may stand
    where a number is wanted.

    Args:
        value: as JSON has it.
        schema: what it must be.
        place: what the message of an error begins with.

    Raises:
        ValueError: naming the key, the rule and the value.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise ValueError(f"{place}{_sentence(str(error), value, schema)}") from None


def _sentence(message: str, value: Any, schema: type) -> str:
    rule, _, path = message.partition(" - at `$")
    name, found = _found(path, message, copy.deepcopy(value), schema)
    missing = re.fullmatch(r"Object missing required field `(.+)`", rule)
    if missing:
        return f"{f'{name}.{missing[1]}'.removeprefix('.')} is missing"
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", rule)
    if unknown:
        return f"{f'{name}.{unknown[1]}'.removeprefix('.')} is not known here"
    wanted = re.match(r"Expected `([^`]+)`(.*?)(, got [^,]*)?$", rule)
    words = _in_words(wanted[1], wanted[2]) if wanted else f"something else ({rule})"
    return f"{name.removeprefix('.') or 'it'} must be {words}, got {shortened(found)}"


def _in_words(kinds: str, bound: str) -> str:
    *others, last = (_WORDS.get(kind, kind) for kind in kinds.split(" | "))
    for sign, words in _BOUNDS.items():
        bound = bound.replace(f" of length{sign}", f" of length{words[3:]}").replace(sign, words)
    return (f"{', '.join(others)} or {last}" if others else last) + bound


def _found(path: str, message: str, document: Any, schema: type) -> tuple[str, Any]:
    """The name and the value that an error is about; `document` is changed.

    msgspec does not name the key of an entry of a mapping: it is the one that alone gives the same
    error.
    """
    name, value = "", document
    for step in _STEP.finditer(path):
        if step["entry"]:
            entries = dict(value)
            for key, entry in entries.items():
                value.clear()
                value[key] = entry
                if _message(document, schema) == message:
                    break
            name, value = f"{name}[{shortened(key)}]", value[key]
        elif step["index"]:
            name, value = f"{name}[{step['index']}]", value[int(step["index"])]
        else:
            name, value = f"{name}.{step['key']}", value[step["key"]]
    return name, value


def _message(value: Any, schema: type) -> str:
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def shortened(value: Any) -> str:
    """A value of JSON as messages show it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
