"""Reports in Markdown: headings, tables and lists, in which every text shows its own characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..files import one_line, printable

T = TypeVar("T")

# What CommonMark, GitHub's tables aside, reads as more than a character. Underscores inside a word
# are none; addresses become links of themselves.
_INLINE = re.compile(
    r"[\\`*\[\]<>#$~]|(?<!\w)_+|_+(?!\w)|&(?=[#\w])|:(?=//)|@(?=[\w-]+\.)|(?i:(?<=\bwww)\.)"
)
# At the start of a line: items and rules, but no signs of numbers.
_START = re.compile(r"^(?:[-+=](?![\d.])|\d{1,9}[.)](?=\s|$))")


class Markdown(str):
    """Text that is Markdown already: tables and lists write it as it is, and escape any other."""


def escaped(text: Any) -> Markdown:
    """`text` as one line of Markdown that shows exactly its characters, wherever it stands.

    Pipes, which mean something in tables alone, are those of `markdown_table` to escape.
    """
    return text if isinstance(text, Markdown) else Markdown(_START.sub(_marked, _inline(text)))


def code(text: Any) -> Markdown:
    """`text` as one line of code; escaped where it has signs that code in a table cannot show."""
    line = one_line(text)
    if not line or "`" in line or "\\|" in line:
        return escaped(line)
    return Markdown(f"`{line}`")


def fenced(text: str, language: str = "") -> Markdown:
    """A block of code that nothing in `text` ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{printable(text)}\n{fence}")


def markdown_table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], *, last_is_text: bool = False
) -> str:
    """The first column is left-aligned, the others are numbers, the last one on demand text."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    if last_is_text:
        ruler[-1] = "---"
    lines = [map(_cell, header), ruler, *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns_table(rows: Iterable[T], columns: Mapping[str, Callable[[T], Any]]) -> str:
    """A table of what each heading says of each row."""
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    return markdown_table(list(columns), cells)


def document(*blocks: str) -> str:
    """Blocks of Markdown with empty lines between them; empty ones are left out."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def section(title: str, *blocks: str) -> str:
    """A heading with what belongs to it, or nothing if there is none."""
    body = "\n\n".join(block for block in blocks if block)
    return f"## {title}\n\n{body}" if body else ""


def bullets(lines: Iterable[Any]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one a line."""
    return bullets(
        Markdown(f"{escaped(key)}: {'-' if value is None else escaped(value)}")
        for key, value in values.items()
    )


def picture(caption: str, name: str) -> str:
    return f"![{caption}]({name})"


def span(low: Any, high: Any) -> str:
    """From one to the other, or the one that both are."""
    return f"{low}" if low == high else f"{low} to {high}"


def _inline(text: Any) -> str:
    return _INLINE.sub(_marked, one_line(text))


def _marked(found: re.Match[str]) -> str:
    return "".join(sign if sign.isalnum() else f"\\{sign}" for sign in found[0])


def _cell(text: Any) -> str:
    shown = text if isinstance(text, Markdown) else _inline(text)
    return shown.replace("|", "\\|")
