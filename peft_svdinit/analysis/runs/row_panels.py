"""Final losses and their differences: one row for each method, one mark for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..canvas import GUIDE
from .compare import Comparison, PairedTable
from .panels import LOSS, Panel, Style, method_styles, short_label
from .tables import TABLE_TITLES

LABEL_WIDTH = 22


def final_losses(comparison: Comparison) -> Panel:
    methods = [method for method in comparison.methods if method.final is not None]

    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        for row, method in enumerate(methods):
            style = styles[method.method]
            color = style.color or ink
            losses = [a.final_loss for a in method.attempts if a.final_loss is not None]
            _dots(axes, row, losses, style.marker, color)
            if method.final is not None:
                _mean_tick(axes, row, method.final.mean, color)
                if method.final.std is not None:
                    ends = (
                        method.final.mean - method.final.std,
                        method.final.mean + method.final.std,
                    )
                    axes.plot(ends, (row, row), color=color, linewidth=1.6)
        reference = comparison.method(comparison.reference).final
        if reference is not None:
            axes.axvline(reference.mean, color=GUIDE, linewidth=0.8, linestyle=":")
        _label_rows(axes, [method.label for method in methods])
        axes.set_xlabel(f"final {LOSS}")

    return Panel(
        name="final",
        title="Final evaluation loss, every seed",
        remarks=(
            "One mark for each seed; the tick is their mean, the bar one sample standard "
            "deviation.",
            f"Dotted: {comparison.method(comparison.reference).label}.",
        ),
        draw=draw,
        height=1.1 + 0.36 * len(methods),
        grid="x",
    )


def differences(comparison: Comparison) -> Panel:
    def draw(axes: Any, ink: str) -> None:
        styles = method_styles(comparison)
        labels: list[str] = []
        for table in comparison.tables:
            labels.append("")
            reference = short_label(table.reference_label, LABEL_WIDTH)
            axes.annotate(
                f"{TABLE_TITLES[table.name]}, against {reference}",
                (0, len(labels) - 0.75),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                color=ink,
                style="italic",
                in_layout=False,
            )
            _draw_table(axes, table, styles, ink, labels)
        axes.axvline(0, color=ink, linewidth=0.8)
        _label_rows(axes, labels)
        axes.set_xlabel("difference in final loss (nats per token)")

    return Panel(
        name="differences",
        title="Difference from the reference at the same seed",
        remarks=(
            "Left of 0 the method ended lower. One mark for each seed; the tick is their mean, "
            "the bar the 95 % t interval of the mean, drawn from three common seeds on. A bar "
            "across 0 is no clear difference.",
        ),
        draw=draw,
        height=1.1 + sum(0.45 + 0.36 * len(table.rows) for table in comparison.tables),
        grid="x",
    )


def _draw_table(
    axes: Any, table: PairedTable, styles: dict[str, Style], ink: str, labels: list[str]
) -> None:
    """One row for each method below the rows already in `labels`, which grows."""
    for row in table.rows:
        style = styles[row.method]
        color = style.color or ink
        _dots(axes, len(labels), row.differences, style.marker, color)
        if row.result.mean is not None:
            _mean_tick(axes, len(labels), row.result.mean, color)
        if row.result.interval is not None:
            axes.plot(row.result.interval, (len(labels),) * 2, color=color, linewidth=1.6)
        labels.append(row.label)


def _dots(axes: Any, row: int, values: Sequence[float], marker: str, color: str) -> None:
    """One mark for each value, spread a little across the row so that ties stay visible."""
    middle = (len(values) - 1) / 2
    heights = [row + 0.09 * (place - middle) for place in range(len(values))]
    axes.scatter(values, heights, s=20, marker=marker, color=color, alpha=0.6, linewidths=0)


def _mean_tick(axes: Any, row: int, mean: float, color: str) -> None:
    axes.plot((mean, mean), (row - 0.26, row + 0.26), color=color, linewidth=2)


def _label_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(
        range(len(labels)), [short_label(label, LABEL_WIDTH, lines=2) for label in labels]
    )
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
