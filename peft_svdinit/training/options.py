"""Options of recipes and commands: dataclasses, a YAML or JSON file, the command line."""

from __future__ import annotations

import difflib
import json
import sys
import types
import typing
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Fill the dataclasses from `--config FILE` and from the command line, which wins.

    A file ends in .yaml, .yml or .json and maps names of options to values of the fields' types;
    text is converted where it has only one meaning (YAML reads `1e-4` as text). Required options
    may stand in the file. A class with an `_argument_group_name` gets its own part of `--help`.

    Args:
        option_classes: dataclasses in the style of `HfArgumentParser`, such as
            `TrainingArguments`; no two may share a field.
        argv: the arguments, by default those of the process.
        description: what `--help` says first.
        prog: the program's name in messages, by default that of the process.

    Returns:
        One instance of each class, in the order given.

    Raises:
        SystemExit: with code 2 after one `error:` line, for a wrong file, name or value, including
            a `ValueError` from a dataclass's `__post_init__`; with code 0 after `--help`.
    """
    # Abbreviated options would hide typing errors, and change meaning when an option is added.
    classes: list[Any] = list(option_classes)
    parser = _Parser(classes, description=description, prog=prog, allow_abbrev=False)
    parser.add_argument_group("configuration").add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML or JSON file of options; the command line overrides it",
    )
    return parser.parse(sys.argv[1:] if argv is None else list(argv))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: a hundred lines with TrainingArguments.
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        self._refuse_unknown_options(argv)
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        config = self.parse_known_args(argv)[0].config
        values = self._read(config) if config else {}
        for action in required:
            action.required = action.dest not in values
        # Not set_defaults: argparse would convert a default that is text once more.
        namespace, extra = self.parse_known_args(argv, Namespace(**values))
        if extra:
            self.error(
                f"unexpected argument {extra[0]!r}; options are written --name value, "
                f"a file of options --config FILE"
            )
        return tuple(self._instance(cls, namespace) for cls in self.dataclass_types)

    def _instance(self, option_class: Any, namespace: Namespace) -> Any:
        names = [field.name for field in fields(option_class) if field.init]
        try:
            return option_class(**{name: getattr(namespace, name) for name in names})
        except ValueError as error:
            self.error(str(error))

    def _refuse_unknown_options(self, argv: list[str]) -> None:
        # Before parsing, where a misspelt required option would be reported as missing.
        for argument in argv:
            if argument == "--":
                return
            option = argument.split("=", 1)[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(
                    f"unknown option {option}{_suggestion(option, self._option_string_actions)}"
                )

    def _read(self, path: Path) -> dict[str, Any]:
        hints: dict[str, Any] = {}
        for option_class in self.dataclass_types:
            types_by_name = typing.get_type_hints(option_class)
            hints |= {f.name: types_by_name[f.name] for f in fields(option_class) if f.init}
        values = {}
        for name, value in self._load(path).items():
            if name not in hints:
                self.error(f"{path}: unknown option {name!r}{_suggestion(str(name), hints)}")
            try:
                values[name] = convert(value, hints[name])
            except ValueError as error:
                self.error(f"{path}: {name} must be {error}, got {value!r}")
        return values

    def _load(self, path: Path) -> Mapping[Any, Any]:
        readers = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
        if path.suffix not in readers:
            self.error(f"--config must end in {', '.join(readers)}, got {path}")
        try:
            content = readers[path.suffix](path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config: cannot read {path}: {error.strerror}")
        except (ValueError, yaml.YAMLError) as error:
            self.error(f"--config: {path} is not valid {path.suffix[1:].upper()}: {error}")
        if content is None:  # an empty YAML file
            return {}
        if not isinstance(content, Mapping):
            self.error(f"--config: {path} must map names of options to values")
        return content


def _suggestion(name: str, valid: Iterable[str]) -> str:
    closest = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {closest[0]}?" if closest else "; --help lists the options"


def convert(value: Any, hint: Any) -> Any:
    """`value`, as YAML or JSON gave it, as the type `hint` of a dataclass field.

    Raises:
        ValueError: if it does not fit; the message says what would ("a number").
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_one_of(value, args)
    if origin is Literal:
        return _chosen(value, args)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _chosen(value, [member.value for member in hint])
    if list in (hint, origin):
        return _convert_list(value, args[0] if args else Any)
    if dict in (hint, origin):
        return _of_type(value, dict, "a mapping")
    if hint is type(None):
        return _of_type(value, hint, "null")
    if hint is bool:
        return _convert_bool(value)
    if hint is int:
        return _convert_int(value)
    if hint is float:
        return _convert_float(value)
    if hint is str:
        return _of_type(value, str, "text in quotes")
    if hint is Path:
        return Path(_of_type(value, str, "a path in quotes"))
    raise ValueError(f"a {getattr(hint, '__name__', hint)}, which only Python code can give")


def _convert_to_one_of(value: Any, hints: Sequence[Any]) -> Any:
    expected: list[str] = []
    # The exact type first: "10" stays text in `int | str`, and True a bool in `str | bool`.
    for hint in sorted(hints, key=lambda hint: type(value) is not hint):
        try:
            return convert(value, hint)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(expected))


def _chosen(value: Any, choices: Sequence[Any]) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise ValueError(f"one of {', '.join(map(repr, choices))}")


def _of_type(value: Any, kind: type, description: str) -> Any:
    if isinstance(value, kind):
        return value
    raise ValueError(description)


def _convert_list(value: Any, hint: Any) -> list[Any]:
    items = _of_type(value, list, "a list")
    try:
        return [convert(item, hint) for item in items]
    except ValueError as error:
        raise ValueError(f"a list with each item {error}") from None


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return string_to_bool(_of_type(value, str, ""))
    except (ArgumentTypeError, ValueError):
        raise ValueError("true or false") from None


def _convert_float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (OverflowError, ValueError):
            pass
    raise ValueError("a number")


def _convert_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # 1e3 is text in YAML, and a whole number
    if isinstance(value, (float, str)):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if number.is_integer():
            return int(number)
    raise ValueError("a whole number")
