"""A parser of options on the command line and in a file, which the command line overrides."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}
_BOOLS = {True: "true", False: "false"}


class OptionParser(argparse.ArgumentParser):
    """`argparse` with `--config FILE`, errors of one line, and no abbreviated options.

    What a file says becomes arguments before those of the command line: one parser reads both, and
    the last one wins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviated options would hide typing errors, and change meaning when an option is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._source = ""
        self.add_argument_group("configuration").add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML or JSON file of options; the command line overrides it",
        )

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: a hundred lines with TrainingArguments.
        self.exit(2, f"{self.prog}: error: {self._source}{' '.join(message.split())}\n")

    def parsed(self, argv: list[str]) -> argparse.Namespace:
        """The options of a file and of the command line.

        Raises:
            SystemExit: with code 2 after one `error:` line for a wrong file, name or value; with
                code 0 after `--help`.
        """
        self._refuse_unknown(argv)
        files = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        files.add_argument("--config", type=Path)
        config = files.parse_known_args(argv)[0].config
        arguments = self._arguments_of(config) if config else []
        namespace, extra = self.parse_known_args([*arguments, *argv])
        if extra:
            self.error(
                f"unexpected argument {extra[0]!r}; options are written --name value, "
                "a file of options --config FILE"
            )
        return namespace

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

    def _arguments_of(self, path: Path) -> list[str]:
        """What the file says, as arguments; each is parsed once alone, to name the file in errors.

        An option of value null is left to its default, where that is none.
        """
        # Of a flag and its opposite, `--no_x`, the flag comes first.
        actions = {action.dest: action for action in reversed(self._actions)}
        del actions["config"]
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        arguments: list[str] = []
        self._source = f"{path}: "
        for name, value in self._content(path).items():
            if name not in actions:
                self.error(f"unknown option {name!r}{_suggestion(str(name), actions)}")
            try:
                own = _arguments(actions[name], value)
            except ValueError as error:
                self.error(f"{name} must be {error}, got {value!r}")
            self.parse_known_args(own)
            arguments += own
        self._source = ""
        for action in required:
            action.required = True
        return arguments

    def _content(self, path: Path) -> Mapping[Any, Any]:
        if path.suffix not in _READERS:
            self.error(f"--config must end in {', '.join(_READERS)}")
        try:
            content = _READERS[path.suffix](path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"--config cannot be read: {error.strerror}")
        except (ValueError, yaml.YAMLError) as error:
            self.error(f"--config is not valid {path.suffix[1:].upper()}: {error}")
        if content is None:  # an empty YAML file
            return {}
        if not isinstance(content, Mapping):
            self.error("--config must map names of options to values")
        return content


def _arguments(action: argparse.Action, value: Any) -> list[str]:
    """A value, as YAML or JSON gave it, as a command line has it.

    Raises:
        ValueError: if it does not fit; the message says what would ("a list").
    """
    option = action.option_strings[0]
    if value is None:
        if action.default is not None:
            raise ValueError("a value")
        return []
    if action.nargs in ("+", "*"):
        if not isinstance(value, list):
            raise ValueError("a list")
        # argparse knows no empty list; the default is one, or the option cannot be empty.
        if not value and action.default:
            raise ValueError("a list with items")
        return [option, *(_text(action, item) for item in value)] if value else []
    return [f"{option}={_text(action, value)}"]


def _text(action: argparse.Action, value: Any) -> str:
    if isinstance(value, str):
        return _whole(value) if action.type is int else value
    if isinstance(value, bool):
        # Text such as `no` and `off` is a bool to YAML, and numbers take none.
        if action.type in (None, str, int, float, Path) and action.choices is None:
            raise ValueError(_EXPECTED[action.type])
        return _BOOLS[value]
    if isinstance(value, (int, float)):
        if action.type in (None, str, Path) and action.choices is None:
            raise ValueError(_EXPECTED[action.type])  # 1.10 would become 1.1
        return _whole(repr(value)) if action.type is int else repr(value)
    if isinstance(value, dict):
        return json.dumps(value)
    raise ValueError("a single value")


_EXPECTED: dict[Any, str] = {
    None: "text in quotes",
    str: "text in quotes",
    Path: "a path in quotes",
    int: "a whole number",
    float: "a number",
}


def _whole(number: str) -> str:
    """`1e3` and `2.0` are whole numbers; what is none stays as it is, for the parser to refuse."""
    try:
        value = float(number)
    except ValueError:
        return number
    exact = number.lstrip("+-").isdigit()
    return str(int(value)) if value.is_integer() and not exact else number


def _suggestion(name: str, valid: Iterable[str]) -> str:
    closest = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {closest[0]}?" if closest else "; --help lists the options"
