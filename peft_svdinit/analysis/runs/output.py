"""Writing a comparison to a directory: report, numbers, page and figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import publishing, write_json, write_text
from ...training import Run, for_json
from .compare import Comparison, compare_runs
from .document import comparison_document
from .figures import draw_png, figure_files
from .html_page import html_page
from .markdown_report import markdown_report
from .reading import EVAL_LOSS
from .verdicts import headline, verdict

FORMAT_VERSION = 1
COMPARISON_REPORT, COMPARISON_NUMBERS = "comparison_report.md", "comparison.json"


@dataclass(frozen=True)
class ComparisonPaths:
    """The files of one written comparison."""

    report: Path
    numbers: Path
    page: Path
    figures: tuple[Path, ...]


def write_comparison(
    runs: Sequence[Run],
    context: Mapping[str, Any],
    output_dir: str | os.PathLike,
    *,
    reference: str = "random",
    total_reference: str | None = None,
    metric: str = EVAL_LOSS,
) -> ComparisonPaths:
    """Compare `runs` and write `comparison_report.md`, `.json`, `.html` and the figures.

    Everything is computed before the first file is written; equal input gives equal files.

    Args:
        runs: completed runs of all methods and seeds.
        context: what the runs do not say themselves: `model`, `dataset`, `machine`,
            `student_steps`, `teacher_steps`, `lora_r`, `teacher_rank`, `teacher_kind` ("lora",
            "full" or "given"), `synthesis` (a mapping; its `energy_kept_mean`, or that of
            the context itself, is the share of the teacher's energy that truncation kept) and
            `command`. All are optional, and others are listed among the settings.
        output_dir: made if it does not exist.
        reference, total_reference, metric: as for `compare_runs`.

    Raises:
        ValueError: as `compare_runs` does.
        ImportError: if scipy, matplotlib or jinja2 is missing.
    """
    comparison = compare_runs(
        runs, reference=reference, total_reference=total_reference, metric=metric
    )
    figures = figure_files(comparison)
    images = {f"{figure.name}.png": draw_png(figure, comparison) for figure in figures}
    document = comparison_document(comparison, context, figures)
    report, page = markdown_report(document), html_page(document, comparison)
    numbers = comparison_numbers(comparison, context)

    folder = Path(output_dir)
    paths = ComparisonPaths(
        report=folder / COMPARISON_REPORT,
        numbers=folder / COMPARISON_NUMBERS,
        page=folder / "comparison.html",
        figures=tuple(folder / name for name in images),
    )
    with publishing(folder) as written:
        for name, image in images.items():
            (written / name).write_bytes(image)
        write_json(written / paths.numbers.name, numbers)
        write_text(written / paths.report.name, report)
        write_text(written / paths.page.name, page)
    return paths


def comparison_numbers(comparison: Comparison, context: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of the comparison for JSON; losses that were not finite become null."""
    numbers = {
        "format_version": FORMAT_VERSION,
        "headline": headline(comparison),
        "context": context,
        **dataclasses.asdict(comparison),
    }
    for table, written in zip(comparison.tables, numbers["tables"], strict=True):
        for row, entry in zip(table.rows, written["rows"], strict=True):
            entry["result"]["outcome"] = row.result.outcome
            entry["verdict"] = verdict(row.result)
    return for_json(numbers)
