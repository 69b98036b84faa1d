"""The built-in data sets by name, and which of their rows may not be on both sides of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..names import guess
from .arithmetic import arithmetic
from .docstrings import stdlib_docstrings
from .signatures import stdlib_names
from .topics import python_topics

_PREFIX = "builtin:"


@dataclass(frozen=True)
class BuiltinDataset:
    """Rows of text with a prompt, a completion and the group that they belong to."""

    summary: str
    """What it teaches, for help texts."""
    rows: Callable[[], list[dict[str, str]]]
    """Dicts of `prompt`, `completion` and `group_column`, in a fixed order."""
    group_column: str
    """Rows with one value of it are all trained on or all held out."""
    split_rows: Callable[[], list[dict[str, str]]]
    """The rows whose groups and their sizes decide which groups are held out. Data sets about the
    same modules share them, so that neither trains on what the other holds out."""


BUILTIN_DATASETS = {
    "builtin:stdlib-docstrings": BuiltinDataset(
        "signature to docstring, of Python's standard library",
        stdlib_docstrings,
        group_column="module",
        split_rows=stdlib_docstrings,
    ),
    "builtin:stdlib-names": BuiltinDataset(
        "docstring to signature, of Python's standard library",
        stdlib_names,
        group_column="module",
        split_rows=stdlib_docstrings,
    ),
    "builtin:python-topics": BuiltinDataset(
        "the next sentence of Python's language reference",
        python_topics,
        group_column="topic",
        split_rows=python_topics,
    ),
    "builtin:arithmetic": BuiltinDataset(
        "word problems in two steps to their solution and its number, as in GSM8K",
        arithmetic,
        group_column="equation",
        split_rows=arithmetic,
    ),
}


def find_builtin(name: str) -> BuiltinDataset | None:
    """The built-in data set of a `builtin:` name; None for any other name.

    Raises:
        ValueError: for an unknown `builtin:` name, with the known ones and the closest of them.
    """
    if not name.startswith(_PREFIX):
        return None
    if name not in BUILTIN_DATASETS:
        raise ValueError(
            f"unknown built-in data set {name!r}; known ones: {', '.join(BUILTIN_DATASETS)}"
            f"{guess(name, BUILTIN_DATASETS)}"
        )
    return BUILTIN_DATASETS[name]
