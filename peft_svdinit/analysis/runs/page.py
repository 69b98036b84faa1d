"""The comparison as one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from . import narrative, tables, wording
from .compare import Comparison
from .figures import FigureFile, draw_svg
from .panels import method_labels, method_styles

# The marks of `panels.MARKERS`, as paths in a box from -5 to 5.
MARKER_PATHS = {
    "o": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "s": "M-3-3h6v6h-6z",
    "^": "M0-4L4 3.2H-4z",
    "D": "M0-4.2L4.2 0L0 4.2L-4.2 0z",
    "v": "M0 4L4-3.2H-4z",
    "P": "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "X": "M-4-2.2L-2.2-4L0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
}
DASH_ARRAYS = {"-": "none", "--": "6 3", "-.": "7 3 2 3", ":": "2 3"}


def html_page(
    comparison: Comparison, context: Mapping[str, Any], figures: Sequence[FigureFile]
) -> str:
    """The whole page: every text is escaped, every figure is inline SVG, nothing is fetched.

    Raises:
        ImportError: if jinja2 or matplotlib is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            "the page needs jinja2; install it with `pip install peft-svdinit[report]`"
        ) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("peft_svdinit.analysis.runs").joinpath("page.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    labels = method_labels(comparison)
    return template.render(
        headline=wording.headline(comparison),
        subtitle=_subtitle(comparison, context),
        warnings=comparison.warnings,
        verdicts=narrative.verdicts(comparison),
        observations=narrative.observations(comparison),
        results=tables.results_table(comparison),
        comparisons=[tables.paired_table(table, comparison) for table in comparison.tables],
        legend=[
            {
                "label": labels[name],
                "color": style.color or "currentColor",
                "marker": MARKER_PATHS[style.marker],
                "dash": DASH_ARRAYS[style.dash],
            }
            for name, style in method_styles(comparison).items()
        ],
        panels=[
            {"title": p.title, "caption": " ".join(p.remarks), "svg": Markup(draw_svg(p))}
            for figure in figures
            for p in figure.panels
        ],
        teacher=narrative.teacher_paragraphs(comparison, context),
        motivation=narrative.motivation(),
        method=narrative.method_paragraphs(context),
        starts=narrative.starts(comparison),
        limitations=narrative.limitations(comparison, context),
        cost=tables.cost_table(comparison),
        seeds=tables.seeds_table(comparison),
        sweep=tables.sweep_table(comparison.sweeps) if comparison.sweeps else None,
        sweep_remarks=narrative.sweep_remarks(comparison),
        settings=tables.settings_table(context),
    )


def _subtitle(comparison: Comparison, context: Mapping[str, Any]) -> str:
    seeds = {attempt.seed for method in comparison.methods for attempt in method.attempts}
    parts = [context.get("model"), context.get("dataset"), context.get("machine")]
    parts.append(f"{len(comparison.methods)} methods")
    parts.append(f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}")
    return " \u00b7 ".join(str(part) for part in parts if part)
