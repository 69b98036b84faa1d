"""What a report says, in order, once: the list of sections that Markdown and HTML are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import setting_tables, tables
from .compare import Comparison
from .figures import FigureFile
from .limits import limits
from .reading import EVAL_LOSS
from .tables import TABLE_TITLES, TextTable
from .verdicts import headline


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; `folded` where few readers look."""

    title: str
    warnings: tuple[str, ...] = ()
    paragraph: str = ""
    table: TextTable | None = None
    figures: tuple[FigureFile, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Document:
    title: str
    headline: str
    subtitle: str
    sections: tuple[Section, ...]


def comparison_document(
    comparison: Comparison, context: Mapping[str, Any], figures: Sequence[FigureFile]
) -> Document:
    """The whole report; sections without content are left out."""
    sections = [
        Section("Read the numbers with these reservations", warnings=comparison.warnings),
        Section("Results", table=tables.results_table(comparison)),
        *(
            Section(TABLE_TITLES[table.name], table=tables.paired_table(table))
            for table in comparison.tables
        ),
        Section("Figures", figures=tuple(figures)),
        Section("Limits", paragraph=limits(comparison, context)),
        Section(
            "Learning-rate sweep", table=setting_tables.sweep_table(comparison.sweeps), folded=True
        ),
        Section("Cost", table=setting_tables.cost_table(comparison), folded=True),
        Section("Every seed", table=tables.seeds_table(comparison), folded=True),
        Section("Settings", table=setting_tables.settings_table(context), folded=True),
    ]
    return Document(
        "Comparison of LoRA starts",
        headline(comparison),
        _subtitle(comparison, context),
        tuple(
            section
            for section in sections
            if section.warnings
            or section.paragraph
            or section.figures
            or (section.table and section.table.rows)
        ),
    )


def _subtitle(comparison: Comparison, context: Mapping[str, Any]) -> str:
    seeds = len({attempt.seed for method in comparison.methods for attempt in method.attempts})
    parts = [context.get("model"), context.get("dataset"), context.get("machine")]
    parts += [f"{len(comparison.methods)} methods", f"{seeds} seed{'s' if seeds != 1 else ''}"]
    parts += [comparison.metric] if comparison.metric != EVAL_LOSS else []
    return " \u00b7 ".join(str(part) for part in parts if part)
