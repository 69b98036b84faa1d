"""The arguments of a verb, from the fields of its dataclass."""

from __future__ import annotations

import types
import typing
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, TypeVar, Union

from ..training import OptionParser, as_typed

Options = TypeVar("Options")
_WORDS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}


def parsed(options_class: type[Options], argv: Sequence[str], *, prog: str) -> Options:
    """An instance of a frozen dataclass, its fields filled from `--config FILE` and `argv`.

    A field's type is a number, text, bool or `Literal`, or a list of these, or one of them or None;
    `metadata["help"]` says what it is for. The class's docstring heads `--help`.

    Raises:
        SystemExit: with code 2 after one `error:` line for wrong options, those that the class
            refuses included; with code 0 after `--help`.
    """
    hints = typing.get_type_hints(options_class)
    parser = OptionParser(prog=prog, description=(options_class.__doc__ or "").strip())
    parser.hints = hints
    own: tuple[Field[Any], ...] = fields(options_class)  # pyright: ignore[reportArgumentType]
    for field in own:
        names = [*_spellings(field.name), *field.metadata.get("aliases", ())]
        parser.add_argument(*names, **_argument(field, hints[field.name]))
        if field.default is True:
            opposite = _spellings(f"no_{field.name}")
            parser.add_argument(*opposite, dest=field.name, action="store_false", help=SUPPRESS)
    namespace = parser.parsed(list(argv))
    try:
        return options_class(**{field.name: getattr(namespace, field.name) for field in own})
    except ValueError as error:
        parser.error(as_typed(str(error), [options_class]))


def _spellings(name: str) -> list[str]:
    """`--max_rank` and `--max-rank`, as HfArgumentParser takes them."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _argument(field: Field[Any], hint: Any) -> dict[str, Any]:
    """Keywords of `add_argument`."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    required = default is MISSING
    shown = "" if required or default in (None, []) else f" (default: {_shown(default)})"
    argument: dict[str, Any] = {
        "required": required,
        "default": None if required else default,
        # argparse formats help with %.
        "help": field.metadata.get("help", "").replace("%", "%%") + shown.replace("%", "%%"),
    }
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = kinds
    if typing.get_origin(hint) is list:
        argument["nargs"] = "+"
        (hint,) = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        argument["choices"] = typing.get_args(hint)
    elif hint is bool:
        argument |= {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        argument |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
    return argument


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default).lower()


def _truth(word: str) -> bool:
    try:
        return _WORDS[word.lower()]
    except KeyError:
        raise ArgumentTypeError(f"true or false expected, got {word!r}") from None
