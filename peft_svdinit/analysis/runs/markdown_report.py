"""A document as Markdown, for a paper's appendix or a README."""

from __future__ import annotations

from collections.abc import Iterator

from ..markdown import bullets, escaped, markdown_table
from .document import Document, Section
from .figures import FigureFile
from .tables import TextTable


def markdown_report(document: Document) -> str:
    """The whole report; it refers to the figures' PNG files beside it."""
    parts = [f"# {document.title}"]
    if document.headline:
        parts.append(f"**{escaped(document.headline)}**")
    parts.append(escaped(document.subtitle))
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield bullets(section.warnings)
    yield escaped(section.paragraph)
    if section.table:
        yield from _table(section.table)
    for figure in section.figures:
        yield from _figure(figure)


def _table(table: TextTable) -> Iterator[str]:
    yield markdown_table(table.header, table.rows, last_is_text=table.last_is_text)
    yield escaped(table.note)


def _figure(figure: FigureFile) -> Iterator[str]:
    yield f"![{figure.title}]({figure.name}.png)"
    remarks = dict.fromkeys(remark for panel in figure.panels for remark in panel.remarks)
    yield escaped(f"{figure.title}. {' '.join(remarks)}")
