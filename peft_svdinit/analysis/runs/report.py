"""The comparison as Markdown, for a paper's appendix or a README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import narrative, tables, wording
from .compare import Comparison
from .figures import FigureFile

MARKUP = re.compile(r"([\\`*_\[\]<>|#$~])")


def markdown_report(
    comparison: Comparison, context: Mapping[str, Any], figures: Sequence[FigureFile]
) -> str:
    """The whole report; it refers to the figures' PNG files beside it."""
    parts = ["# Comparison of LoRA starts", f"**{escaped(wording.headline(comparison))}**"]
    if comparison.warnings:
        quoted = ["> **Read the numbers with these reservations:**", ">"]
        quoted += [f"> - {escaped(warning)}" for warning in comparison.warnings]
        parts.append("\n".join(quoted))
    parts += ["## Motivation", escaped(narrative.motivation()), "## Method"]
    parts += [escaped(text) for text in narrative.method_paragraphs(context)]
    described = narrative.starts(comparison)
    if described:
        parts.append(_bullets([f"{label}: {text}" for label, text in described]))
    parts += [escaped(text) for text in narrative.teacher_paragraphs(comparison, context)]
    parts.append(_table(tables.settings_table(context), "###"))
    parts += ["## Results", _table(tables.results_table(comparison))]
    parts += [_table(tables.paired_table(table, comparison), "###") for table in comparison.tables]
    parts.append(_table(tables.cost_table(comparison), "###"))
    if comparison.sweeps:
        parts.append(_table(tables.sweep_table(comparison.sweeps), "###"))
        parts.append(_bullets(narrative.sweep_remarks(comparison)))
    parts.append(_table(tables.seeds_table(comparison), "###"))
    parts.append("### Figures")
    for figure in figures:
        parts.append(f"![{figure.title}]({figure.name}.png)")
        remarks = dict.fromkeys(remark for panel in figure.panels for remark in panel.remarks)
        parts.append(escaped(f"{figure.title}. {' '.join(remarks)}"))
    parts += ["## Analysis", _bullets(narrative.verdicts(comparison))]
    parts.append(_bullets(narrative.observations(comparison)))
    parts += ["## Limitations", _bullets(narrative.limitations(comparison, context))]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """`text` as one line of Markdown that shows exactly its characters."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def _table(table: tables.TextTable, heading: str = "") -> str:
    if not table.rows:
        return ""
    rules = ["---", *["---:"] * (len(table.header) - 1)]
    if table.last_is_text:
        rules[-1] = "---"
    lines = [_row(table.header), _row(rules, raw=True)]
    lines += [_row(row) for row in table.rows]
    parts = [f"{heading} {table.title}"] if heading else []
    return "\n\n".join([*parts, "\n".join(lines), *([escaped(table.note)] if table.note else [])])


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return f"| {' | '.join(cell if raw else escaped(cell) for cell in cells)} |"


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(text)}" for text in texts)
