"""Composing panels into figures: PNG files for the report, SVG elements for the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .compare import Comparison
from .panels import (
    MUTED,
    Panel,
    curves,
    differences,
    final_losses,
    has_second_half,
    learning_rates,
    method_labels,
    method_styles,
    short_label,
)

INK = "#1c1f24"
# Replaced by `currentColor` in the page's SVG; no other colour may have this value.
PAGE_INK = "#010203"
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
    matplotlib = _matplotlib()
    panels = figure_file.panels
    width = 5.4 * len(panels) if len(panels) > 1 else 7.2
    height = 0.3 + max(panel.height for panel in panels)
    with matplotlib.rc_context(_settings(INK)):
        handles = _legend_handles(comparison, figure_file.legend, matplotlib)
        # At 9 points a character takes about 0.075 inches, a line 0.18.
        longest = max((len(handle.get_label()) for handle in handles), default=0)
        columns = max(1, min(len(handles), int(width / (0.7 + 0.075 * longest))))
        height += 0.18 * math.ceil(len(handles) / columns)
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        figure.set_facecolor("white")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            panel.draw(axes, INK)
            axes.set_title(panel.title, fontsize=10, loc="left")
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        return _saved(figure, "png", dpi=160)


def draw_svg(panel: Panel) -> str:
    """The panel alone as an SVG element without any address in it, in the page's text colour."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context({**_settings(PAGE_INK), "svg.hashsalt": panel.name}):
        figure = matplotlib.figure.Figure(figsize=(PAGE_WIDTH, panel.height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        panel.draw(axes, PAGE_INK)
        text = _saved(figure, "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # An SVG element inside HTML needs no namespaces, and the page promises not to hold addresses.
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=").replace(PAGE_INK, "currentColor")
    # The outermost element loses its size, so that the page's CSS gives it one.
    end = text.index(">")
    return re.sub(r'\s(width|height)="[^"]*"', "", text[:end]) + text[end:]


def _legend_handles(comparison: Comparison, names: Sequence[str], matplotlib: Any) -> list[Any]:
    labels = method_labels(comparison)
    return [
        matplotlib.lines.Line2D(
            [],
            [],
            color=style.color or INK,
            marker=style.marker,
            linestyle=style.dash,
            markersize=4,
            label=short_label(labels[name]),
        )
        for name, style in method_styles(comparison).items()
        if name in names
    ]


def _settings(ink: str) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlecolor": ink,
        "grid.color": MUTED,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
    }


def _saved(figure: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.lines
    except ImportError as error:
        raise ImportError(
            "the figures need matplotlib; install it with `pip install peft-svdinit[report]`"
        ) from error
    return matplotlib
