"""Reports in Markdown: headings, tables and lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MARKUP = re.compile(r"([\\`*_\[\]<>|#$~])")
UNESCAPED_PIPE = re.compile(r"(?<!\\)\|")


def escaped(text: Any) -> str:
    """`text` as one line of Markdown that shows exactly its characters."""
    return MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], *, last_is_text: bool = False
) -> str:
    """The first column is left-aligned, the others are numbers, the last one on demand text."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    if last_is_text:
        ruler[-1] = "---"
    lines = [header, ruler, *rows]
    return "\n".join(
        "| " + " | ".join(UNESCAPED_PIPE.sub(r"\\|", str(cell)) for cell in line) + " |"
        for line in lines
    )


def columns_table(rows: Iterable[T], columns: Mapping[str, Callable[[T], Any]]) -> str:
    """A table of what each heading says of each row."""
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    return markdown_table(list(columns), cells)


def document(*blocks: str) -> str:
    """Blocks with empty lines between them; empty ones are left out."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def section(title: str, *blocks: str) -> str:
    """A heading with what belongs to it, or nothing if there is none."""
    body = "\n\n".join(block for block in blocks if block)
    return f"## {title}\n\n{body}" if body else ""


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one a line."""
    return bullets(f"{key}: {'-' if value is None else value}" for key, value in values.items())


def picture(caption: str, name: str) -> str:
    return f"![{caption}]({name})"


def span(low: Any, high: Any) -> str:
    """From one to the other, or the one that both are."""
    return f"{low}" if low == high else f"{low} to {high}"
