"""Heat maps of depth against module type: where the change sits and what a rank loses of it."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...models import layer_depth
from ..canvas import GUIDE, new_figure, save_figure
from .layers import Analysis, LayerAnalysis

NO_DEPTH = "-"
MOST_TYPES = 24
# Cells in grids of at most this many rows are tall enough for a number.
MOST_LABELLED_ROWS = 16
EMPTY = "#E9E9E9"
WIDEST = 20.0  # inches


@dataclass(frozen=True)
class Panel:
    """One heat map: a number of each layer, in words and in colours."""

    title: str
    unit: str
    value: Callable[[LayerAnalysis], float | None]
    colours: str
    log: bool = False
    whole: bool = False


def plot_heat_maps(
    analysis: Analysis,
    path: str | os.PathLike,
    *,
    ranks: Mapping[str, int] | None = None,
    title: str = "",
) -> None:
    """Relative norm, error, stable rank and recommended rank of every block and module type.

    Rows are the blocks, which are the first numbers in the modules' names; modules without one
    share a row. Where several layers share a cell (experts) it shows their median. Cells without a
    layer are grey, and so are zero deltas in all maps but that of the norm. Beyond 24 module types
    the commonest are drawn.

    Args:
        analysis: the layers.
        path: of the PNG.
        ranks: recommended rank of each layer; without it that map is left out.
        title: above the maps.

    Raises:
        ImportError: without matplotlib.
    """
    cells, kinds, depths = _grid(analysis)
    panels = _panels(analysis, ranks)
    row_height = min(0.42, max(0.11, 8.0 / len(depths)))
    labelled = len(depths) <= MOST_LABELLED_ROWS
    column = 0.62 if labelled else 0.4
    width = max(3.0, column * len(kinds) + 1.1)
    tilted = 0.075 * max(map(len, kinds))
    height = max(1.6, row_height * len(depths)) + 1.5 + tilted
    # Side by side as far as a page goes, else below each other.
    columns = next((n for n in (4, 2) if width * min(n, len(panels)) <= WIDEST), 1)
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(width * columns, height * rows)
    hidden = len(set(analysis.module_types.values())) - len(kinds)
    note = f"; {hidden} rarer module types are not drawn" if hidden else ""
    figure.suptitle(f"{title}{note}" if title else note.removeprefix("; "), fontsize=13)
    grid = figure.subplots(rows, columns, squeeze=False)
    for line in grid:
        line[0].set_ylabel("block")
    places = [axes for line in grid for axes in line]
    for axes, panel in zip(places, panels, strict=False):
        _draw(figure, axes, panel, cells, kinds, depths, labelled)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    save_figure(figure, path)


def _grid(
    analysis: Analysis,
) -> tuple[dict[tuple[str, int | str], list[LayerAnalysis]], list[str], list[int | str]]:
    """Layers by (kind, depth), the kinds in order of appearance, and the depths in order."""
    counts = Counter(analysis.module_types.values())
    shown = {kind for kind, _ in counts.most_common(MOST_TYPES)}
    cells: dict[tuple[str, int | str], list[LayerAnalysis]] = defaultdict(list)
    for layer in analysis.layers:
        kind = analysis.module_types[layer.name]
        if kind in shown:
            depth = layer_depth(layer.name)
            cells[kind, NO_DEPTH if depth is None else depth].append(layer)
    numbered = sorted({depth for _, depth in cells if isinstance(depth, int)})
    rest = [NO_DEPTH] if any(depth == NO_DEPTH for _, depth in cells) else []
    return dict(cells), [kind for kind in counts if kind in shown], [*numbered, *rest]


def _panels(analysis: Analysis, ranks: Mapping[str, int] | None) -> list[Panel]:
    def changed(value: Callable[[LayerAnalysis], float]) -> Callable[[LayerAnalysis], float | None]:
        return lambda layer: value(layer) if layer.norm else None

    if any(layer.relative_norm is not None for layer in analysis.layers):
        norm = Panel(
            "size of the change",
            "‖Δ‖ / ‖W‖ [%]",
            lambda layer: None if layer.relative_norm is None else 100 * layer.relative_norm,
            "viridis",
            log=True,
        )
    else:
        norm = Panel("size of the change", "‖Δ‖", lambda layer: layer.norm, "viridis", log=True)
    panels = [
        norm,
        Panel(
            f"error at rank {analysis.rank}",
            "‖Δ - Δᵣ‖ / ‖Δ‖ [%]",
            changed(lambda layer: 100 * layer.reconstruction_error),
            "cividis",
        ),
        Panel(
            "stable rank",
            "‖Δ‖² / σ₁²",
            changed(lambda layer: layer.stable_rank),
            "viridis",
            log=True,
        ),
    ]
    if ranks is not None:
        panels.append(
            Panel(
                "recommended rank",
                "rank",
                changed(lambda layer: ranks[layer.name]),
                "cividis",
                log=True,
                whole=True,
            )
        )
    return panels


def _draw(
    figure: Any,
    axes: Any,
    panel: Panel,
    cells: Mapping[tuple[str, int | str], list[LayerAnalysis]],
    kinds: list[str],
    depths: list[int | str],
    labelled: bool,
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

    rows = [[_median(cells.get((kind, depth), ()), panel) for kind in kinds] for depth in depths]
    positive = [value for row in rows for value in row if value is not None and value > 0]
    # A log scale pays only where the values differ by more than a small factor.
    log = panel.log and bool(positive) and max(positive) > 5 * min(positive)
    known = positive if log else [value for row in rows for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    equal = not low < high
    if equal:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    colours = colormaps[panel.colours].with_extremes(bad=EMPTY, under=EMPTY)
    scale = LogNorm(low, high) if log else Normalize(low, high)
    image = axes.imshow(
        [[math.nan if value is None else value for value in row] for row in rows],
        aspect="auto",
        cmap=colours,
        norm=scale,
        interpolation="none",
    )
    axes.set_title(panel.title, fontsize=11)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(kinds)), kinds, **(turned if max(map(len, kinds)) > 4 else {}))
    step = math.ceil(len(depths) / 32)
    axes.set_yticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    # White lines between the cells.
    axes.set_xticks([i - 0.5 for i in range(1, len(kinds))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if labelled:
        _write_values(axes, panel, rows, colours, scale)
    if not known:
        axes.text(0.5, 0.5, "no layer changed", ha="center", transform=axes.transAxes, color=GUIDE)
        return
    ticks = LogLocator(subs=(1.0, 2.0, 5.0)) if log else MaxNLocator(5, integer=panel.whole)
    if equal:
        ticks = FixedLocator([known[0]])
    bar = figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        pad=0.02,
        aspect=24,
        ticks=ticks,
        format=FuncFormatter(lambda value, _: f"{value:.4g}"),
    )
    bar.set_label(panel.unit, fontsize=10)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, rotation=30 if log else 0)


def _median(layers: Any, panel: Panel) -> float | None:
    values = [value for layer in layers if (value := panel.value(layer)) is not None]
    return statistics.median(values) if values else None


def _write_values(
    axes: Any, panel: Panel, rows: list[list[float | None]], colours: Any, scale: Any
) -> None:
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            if value is None:
                continue
            text = f"{value:.0f}" if panel.whole or value >= 99.5 else f"{value:.2g}"
            red, green, blue, _ = colours(scale(value))
            # Luminance of Rec. 709 decides between dark and light letters.
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
