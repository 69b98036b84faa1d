"""Values that options of the command line should not have."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

HUGE = "1" + 400 * "0"
INTEGERS = ["nan", "inf", "-1", "0", HUGE, "1e400", "1.5", "text", ""]
NUMBERS = ["nan", "inf", "-inf", "-1", "0", "2", HUGE, "1e400", "1e-400", "text", ""]
TEXTS = [
    "", " ", "text", ".", "..", "/", "/dev/null", "/proc/self/mem", "~nobody/x", "a\nb", "ü☃",
    300 * "x", 5000 * "x", "user/name@", "@main", "user/na me", "(", "[", "*", "builtin:",
    "builtin:none", "https://host/x", "-1", "nan",
]  # fmt: skip
# In the folder of the test, which is the current one.
OUTPUTS = [
    "file", "file/below", "dangling", "itself", "itself/below", "/dev/null", "/dev/null/below",
    "/proc/none", "~nobody/x", 300 * "x", 5000 * "x",
]  # fmt: skip


def _values(name: str, hint: Any) -> list[str]:
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _values(name, kinds[0])
    if name in ("output", "output_dir"):
        return OUTPUTS
    if typing.get_origin(hint) is list:
        return [*_values(name, kinds[0]), "same same"]
    if typing.get_origin(hint) is typing.Literal or hint is bool:
        return ["text", "", "-1"]
    return {int: INTEGERS, float: NUMBERS}.get(hint, TEXTS)


def wrong_options(options_class: type) -> Iterator[list[str]]:
    """Arguments with one option each that has no value, or a strange one."""
    hints = typing.get_type_hints(options_class)
    for entry in fields(options_class):
        option = f"--{entry.name}"
        if hints[entry.name] is not bool:
            yield [option]
        for value in _values(entry.name, hints[entry.name]):
            yield [option, *(value.split(" ") if value == "same same" else [value])]


def is_no_number(arguments: list[str], options_class: type) -> bool:
    """Whether an option that wants a number is given none, NaN or an infinity."""
    hint = typing.get_type_hints(options_class)[arguments[0].removeprefix("--")]
    wants = {int, float} & {hint, *typing.get_args(hint)}
    return bool(wants) and arguments[-1] in ("nan", "inf", "-inf", "1e400", "text", "")
