"""Options of recipes: dataclasses such as `TrainingArguments`, a file, the command line."""

from __future__ import annotations

import sys
import typing
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .invocation import invocation
from .option_parser import OptionParser
from .refusal import REFUSALS, as_typed


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    prog: str | None = None,
    script: str | None = None,
) -> tuple[Any, ...]:
    """Fill the dataclasses from `--config FILE` and from the command line, which wins.

    A file ends in .yaml, .yml or .json and maps names of options to values. Required options may
    stand in the file. A class with an `_argument_group_name` gets its own part of `--help`.

    Args:
        option_classes: dataclasses in the style of `HfArgumentParser`, such as
            `TrainingArguments`; no two may share a field.
        argv: the arguments, by default those of the process.
        description: what `--help` says first.
        prog: the program's name in messages, by default that of the process.
        script: the recipe's file; with it a class with a field `invocation` gets the command that
            says the same without a file.

    Returns:
        One instance of each class, in the order given.

    Raises:
        SystemExit: with code 2 after one `error:` line, for a wrong file, name or value, including
            what a dataclass's `__post_init__` refuses; with code 0 after `--help`.
    """
    classes: list[Any] = list(option_classes)
    parser = _RecipeParser(classes, description=description, prog=prog)
    given = sys.argv[1:] if argv is None else list(argv)
    namespace = parser.parsed(given)
    instances = []
    for option_class in classes:
        names = [entry.name for entry in fields(option_class) if entry.init]
        try:
            instances.append(option_class(**{name: getattr(namespace, name) for name in names}))
        except REFUSALS as error:
            parser.error(as_typed(str(error), classes))
    for instance in instances:
        if script is not None and hasattr(instance, "invocation"):
            instance.invocation = invocation(script, given, *parser.of_file)
    return tuple(instances)


class _RecipeParser(OptionParser, HfArgumentParser):
    """HfArgumentParser's reading of dataclasses, our parsing."""

    def __init__(self, classes: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        for option_class in classes:
            kinds = typing.get_type_hints(option_class)
            own = {entry.name: kinds[entry.name] for entry in fields(option_class) if entry.init}
            self.hints = {**self.hints, **own}
        mixed = {n for n, hint in self.hints.items() if {bool, str} <= set(typing.get_args(hint))}
        for action in self._actions:
            # HfArgumentParser takes only the words for true and false of `bool | str`.
            if action.dest in mixed and action.type is string_to_bool:
                action.type = _truth_or_text


def _truth_or_text(word: str) -> bool | str:
    try:
        return string_to_bool(word)
    except ArgumentTypeError:
        return word
