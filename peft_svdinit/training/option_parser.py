"""A parser of options on the command line and in a file, which the command line overrides."""

from __future__ import annotations

import argparse
import math
import types
import typing
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from ..files import one_line
from .names import guess
from .option_file import read_option_file
from .option_values import fault_of_value

_BOOLS = {True: "true", False: "false"}


class OptionParser(argparse.ArgumentParser):
    """`argparse` with `--config FILE`, errors of one line, and no abbreviated options.

    What a file says becomes arguments before those of the command line: one parser reads both, and
    the last one wins. What no command line can say (null, an empty list, a mapping) is taken where
    the option's type has it.

    Attributes:
        hints: types of the options by name.
        of_file: what the file that was read says, as arguments and as values that no argument can
            say.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviated options would hide typing errors, and change meaning when an option is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.hints: Mapping[str, Any] = {}
        self.of_file: tuple[list[str], dict[str, Any]] = [], {}
        self._source = ""
        self.add_argument_group("configuration").add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML or JSON file of options; the command line overrides it",
        )

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: a hundred lines with TrainingArguments.
        self.exit(2, f"{self.prog}: error: {self._source}{one_line(message)}\n")

    def parsed(self, argv: list[str]) -> argparse.Namespace:
        """The options of a file and of the command line.

        Raises:
            SystemExit: with code 2 after one `error:` line for a wrong file, name or value; with
                code 0 after `--help`.
        """
        self._refuse_unknown(argv)
        files = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        files.error = self.error
        files.add_argument("--config", type=Path)
        config = files.parse_known_args(argv)[0].config
        arguments, values = self.of_file = self._read(config) if config else ([], {})
        namespace = argparse.Namespace(**values)
        namespace, extra = self.parse_known_args([*arguments, *argv], namespace)
        if extra:
            self.error(
                f"unexpected argument {extra[0]!r}; options are written --name value, "
                "a file of options --config FILE"
            )
        self._refuse_faults(namespace)
        return namespace

    def _refuse_faults(self, namespace: argparse.Namespace) -> None:
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if value != action.default and (fault := fault_of_value(value)):
                self.error(f"--{action.dest} {fault}")

    def _refuse_unknown(self, argv: list[str]) -> None:
        # Before parsing, where a misspelt required option would be reported as missing.
        for argument in argv:
            if argument == "--":
                return
            option = argument.split("=", 1)[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(
                    f"unknown option {option}{_suggestion(option, self._option_string_actions)}"
                )

    def _read(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        """What a file says: as arguments, and what no argument can say as values.

        Each argument is parsed once alone, so that an error names the file.
        """
        # Of a flag and its opposite, `--no_x`, the flag comes first.
        actions = {action.dest: action for action in reversed(self._actions)}
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        arguments: list[str] = []
        values: dict[str, Any] = {}
        self._source = f"{path}: "
        try:
            content = read_option_file(path)
        except ValueError as error:
            self.error(str(error))
        for name, value in content.items():
            if name not in self.hints:
                self.error(f"unknown option {name!r}{_suggestion(str(name), self.hints)}")
            if value != actions[name].default and (fault := fault_of_value(value)):
                self.error(f"{name} {fault}")
            if _is_beyond_arguments(value, actions[name], self.hints[name]):
                values[name] = value
                continue
            try:
                own = _arguments(actions[name], value)
            except ValueError as error:
                self.error(f"{name} must be {error}, got {value!r}")
            self._refuse_faults(self.parse_known_args(own)[0])
            arguments += own
        self._source = ""
        for action in required:
            action.required = action.dest not in values
        return arguments, values


def _is_beyond_arguments(value: Any, action: argparse.Action, hint: Any) -> bool:
    """Whether the option's type has this value, and no argument can say it."""
    takes_many = action.nargs in ("+", "*")
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = {typing.get_origin(k) or k for k in (typing.get_args(hint) if union else (hint,))}
    if value is None:
        return type(None) in kinds
    if isinstance(value, list):
        return list in kinds and (not value or not takes_many)
    if isinstance(value, dict):
        return dict in kinds
    return takes_many and isinstance(value, str) and str in kinds and list in kinds


def _arguments(action: argparse.Action, value: Any) -> list[str]:
    """A value, as YAML or JSON gave it, as a command line has it.

    Raises:
        ValueError: if it does not fit; the message says what would ("a list").
    """
    option = action.option_strings[0]
    if action.nargs in ("+", "*"):
        if not isinstance(value, list):
            raise ValueError("a list")
        return [option, *(_text(action, item) for item in value)]
    return [f"{option}={_text(action, value)}"]


def _text(action: argparse.Action, value: Any) -> str:
    kind = None if action.choices is not None else action.type or str
    if isinstance(value, str):
        return _whole(value) if kind is int else value
    # Text such as `no` and `1.10` is a bool and a number to YAML.
    if isinstance(value, bool) and kind not in _EXPECTED:
        return _BOOLS[value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kind not in _TEXTS:
        # argparse takes `-1e-05` for an option.
        plain = format(Decimal(repr(value)), "f") if math.isfinite(value) else repr(value)
        return _whole(plain) if kind is int else plain
    raise ValueError(_EXPECTED.get(kind, "a single value"))


_EXPECTED: dict[Any, str] = {
    str: "text in quotes",
    Path: "a path in quotes",
    int: "a whole number",
    float: "a number",
}
_TEXTS = (str, Path)


def _whole(number: str) -> str:
    """`1e3` and `2.0` are whole numbers; what is none stays as it is, for the parser to refuse."""
    try:
        value = float(number)
    except ValueError:
        return number
    exact = number.lstrip("+-").isdigit()
    return str(int(value)) if value.is_integer() and not exact else number


def _suggestion(name: str, valid: Iterable[str]) -> str:
    return guess(name, valid) or "; --help lists the options"
