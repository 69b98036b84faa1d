"""Options of recipes and commands: dataclasses, a YAML or JSON file, the command line."""

from __future__ import annotations

import difflib
import dis
import json
import os
import re
import sys
import sysconfig
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
            self.error(_as_typed(str(error), list(self.dataclass_types)))

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


def refusal(error: Exception, options: Sequence[Any]) -> str | None:
    """The line that tells a user of a wrong input; None of a fault of the program itself.

    An input is at fault where the disk or the network says so (`OSError`), and where a `raise`
    statement of ours does (`ValueError`, `TypeError`, `ImportError`). The same errors from Python,
    from torch or from any other library are faults of the code that called them. What a library
    thinks of a user's file is raised anew where the file is read.

    The line names options as they were typed: an argument in front of the message becomes
    `--argument`. Where functions know an option by other names, its dataclass says so in
    `_known_as`, a mapping of the option to these names. A message that only quotes what was given
    has the option put before it.

    Args:
        error: what was raised.
        options: the dataclasses of the options, or their instances if there are any yet.
    """
    if not isinstance(error, OSError) and not (
        isinstance(error, ValueError | TypeError | ImportError) and _is_raised_by_us(error)
    ):
        return None
    file = error.filename if isinstance(error, OSError) else None
    return _as_typed(
        " ".join(str(error).split()), options, file if isinstance(file, str | os.PathLike) else None
    )


def _is_raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    module = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return module in ("peft_svdinit", "trainer_callbacks") or not _is_installed(code.co_filename)


def _is_installed(file: str) -> bool:
    """Whether it belongs to a library, where a recipe or a user's script does not."""
    path = Path(file)
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or path.is_relative_to(
        sysconfig.get_path("stdlib")
    )


def _as_typed(message: str, options: Sequence[Any], file: str | os.PathLike | None = None) -> str:
    """`message` about options, or about a `file`, with their names as they are typed."""
    typed, given = _names(options)
    name = "|".join(sorted(map(re.escape, typed), key=len, reverse=True))
    bare, ends = r"(?<![\w./('\"-])", r"\b(?![./-])"
    compound = "|".join(each for each in name.split("|") if "_" in each) or "(?!)"
    # A single word may be one of the sentence, unless it is in a list, first, or before a value.
    for pattern in (
        rf"{bare}(?:{name})(?:(?:, | and | or )(?:{name}))+{ends}",
        rf"^(?:{name}){ends}",
        rf"{bare}(?:{name})(?==)",
        rf"{bare}(?:{compound}){ends}",
    ):
        message = re.sub(
            pattern,
            lambda found: re.sub(
                r"\w+",
                lambda word: f"--{typed[word[0]]}" if word[0] in typed else word[0],
                found[0],
            ),
            message,
        )
    if message.startswith("--"):
        return message
    quoted = {option: _quoted(value, message, file) for option, value in given.items()}
    option = max(quoted, key=lambda option: quoted[option], default="")
    return f"--{option}: {message}" if quoted.get(option) else message


def _names(options: Sequence[Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """(the option that every name in a message means, values of the options that were given)."""
    typed: dict[str, str] = {}
    given: dict[str, Any] = {}
    for group in options:
        typed |= {entry.name: entry.name for entry in fields(group) if entry.init}
        given |= {} if isinstance(group, type) else _given(group)
    for group in options:
        for option, names in getattr(group, "_known_as", {}).items():
            if option in given or isinstance(group, type):
                # An option that was given keeps its name.
                typed |= {name: option for name in names if name not in given}
    return typed, given


def _given(group: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    values = {}
    for entry in fields(group):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if entry.init and getattr(group, entry.name) != default:
            values[entry.name] = getattr(group, entry.name)
    return values


def _quoted(value: Any, message: str, file: str | os.PathLike | None) -> int:
    """Length of the longest text of an option that `message` quotes or `file` belongs to."""
    longest = 0
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | os.PathLike):
            continue
        text = os.fspath(item)
        for path in {text, os.path.expanduser(text)}:
            is_path = "/" in path or ":" in path or os.path.exists(path)
            within = file is not None and Path(file) in Path(path).parents
            if repr(path) in message or (is_path and path in message) or within:
                longest = max(longest, len(path))
    return longest


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
