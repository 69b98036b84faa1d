"""Composing panels into figures: PNG files for the report, SVG elements for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..canvas import INK, PAGE_INK, legend_outside, new_figure, panels, png_of, svg_of, tidy
from .compare import Comparison
from .curve_panels import curves, has_second_half, learning_rates
from .panels import Panel, method_labels, method_styles, short_label
from .row_panels import differences, final_losses

# Narrow, so that its text stays legible on a phone (inches).
PAGE_WIDTH = 4.3


@dataclass(frozen=True)
class FigureFile:
    """A composed figure for the report; `legend` lists the methods that need one."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    legend: tuple[str, ...] = ()


def figure_files(comparison: Comparison) -> tuple[FigureFile, ...]:
    """The figures that this comparison has data for."""
    names = tuple(method.method for method in comparison.methods)
    whole = (curves(comparison, "steps"), curves(comparison, "budget"))
    files = [FigureFile("loss_curves", "Evaluation loss in training", whole, names)]
    if has_second_half(comparison):
        late = (curves(comparison, "steps", late=True), curves(comparison, "budget", late=True))
        title = "Evaluation loss, second half of training"
        files.append(FigureFile("loss_curves_late", title, late, names))
    files.append(FigureFile("final_loss", "Final evaluation loss", (final_losses(comparison),)))
    if comparison.tables:
        panel = differences(comparison)
        files.append(FigureFile("differences", "Paired differences", (panel,)))
    if comparison.sweeps:
        swept = tuple(sweep.method for sweep in comparison.sweeps)
        panel = learning_rates(comparison)
        files.append(FigureFile("learning_rates", "Learning rates", (panel,), swept))
    return tuple(files)


def draw_png(figure_file: FigureFile, comparison: Comparison) -> bytes:
    """The composed figure as PNG on white, with its legend below."""
    drawn = figure_file.panels
    width = 5.4 * len(drawn) if len(drawn) > 1 else 7.2
    figure = new_figure(width, 0.3 + max(panel.height for panel in drawn))
    for axes, panel in zip(panels(figure, len(drawn), len(drawn)), drawn, strict=True):
        _draw(axes, panel, INK)
        axes.set_title(panel.title, fontsize=10, loc="left")
    if figure_file.legend:
        _add_legend(figure, comparison, figure_file.legend)
    return png_of(figure)


def draw_svg(panel: Panel) -> str:
    """The panel alone as an SVG element, in the page's text colour."""
    figure = new_figure(PAGE_WIDTH, panel.height)
    _draw(figure.subplots(), panel, PAGE_INK)
    return svg_of(figure, panel.name)


def _draw(axes: Any, panel: Panel, ink: str) -> None:
    tidy(axes, ink, grid=panel.grid)
    panel.draw(axes, ink)
    axes.tick_params(labelsize=9)


def _add_legend(figure: Any, comparison: Comparison, methods: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    labels = method_labels(comparison)
    shown = {name: style for name, style in method_styles(comparison).items() if name in methods}
    looks: list[dict[str, Any]] = [
        {"color": style.color or INK, "marker": style.marker, "linestyle": style.dash}
        for style in shown.values()
    ]
    handles = [Line2D([], [], markersize=4, **look) for look in looks]
    legend_outside(figure, handles, [short_label(labels[name]) for name in shown])
