"""Text and tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

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
