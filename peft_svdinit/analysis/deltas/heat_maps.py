"""Heat maps of depth against module type: where the change sits and what a rank loses of it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..canvas import new_figure, panels, save_figure, say, shortened, shown_types
from ..cells import MOST_ROWS, by_depth, colour_bar, draw_cells, short_number
from .layers import LayerAnalysis
from .totals import Analysis

MOST_TYPES = 24
# Cells in grids of at most this many rows are tall enough for a number.
MOST_LABELLED_ROWS = 16
WIDEST = 20.0  # inches


@dataclass(frozen=True)
class HeatMap:
    """A number of each layer, in words and in colours."""

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
    share a row, and so do neighbours of more blocks than a page has lines for. Where several layers
    share a cell (experts) it shows their median. Cells without a layer are grey, and so are zero
    deltas in all maps but that of the norm. Beyond 24 module types the commonest are drawn.

    Args:
        analysis: the layers.
        path: of the PNG.
        ranks: recommended rank of each layer; without it that map is left out.
        title: above the maps.

    Raises:
        ImportError: without matplotlib.
    """
    types = analysis.module_types
    shown = shown_types(types.values(), MOST_TYPES)
    layers = {layer.name: layer for layer in analysis.layers if types[layer.name] in shown}
    depths, kinds, cells = by_depth(layers, types, MOST_ROWS)
    maps = _heat_maps(analysis, ranks)
    labelled = len(depths) <= MOST_LABELLED_ROWS
    width = max(3.0, (0.62 if labelled else 0.4) * len(kinds) + 1.1)
    row_height = min(0.42, max(0.11, 8.0 / len(depths)))
    longest = max(len(shortened(kind)) for kind in kinds)
    height = max(1.6, row_height * len(depths)) + 1.5 + 0.075 * longest
    # Side by side as far as a page goes, else below each other.
    columns = next((n for n in (4, 2) if width * min(n, len(maps)) <= WIDEST), 1)
    columns = min(columns, len(maps))
    hidden = len(set(types.values())) - len(kinds)
    note = f"{hidden} rarer module types are not drawn" if hidden else ""
    heading = "; ".join(part for part in (title, note) if part)
    figure = new_figure(width * columns, height * math.ceil(len(maps) / columns), heading)
    places = panels(figure, len(maps), columns)
    for axes, heat_map in zip(places, maps, strict=True):
        values = [
            [_median(cells.get((depth, kind), ()), heat_map) for kind in kinds] for depth in depths
        ]
        _draw(figure, axes, heat_map, values, depths, kinds, labelled)
    for axes in places[::columns]:
        axes.set_ylabel("block")
    save_figure(figure, path)


def _heat_maps(analysis: Analysis, ranks: Mapping[str, int] | None) -> list[HeatMap]:
    def changed(value: Callable[[LayerAnalysis], float]) -> Callable[[LayerAnalysis], float | None]:
        return lambda layer: value(layer) if layer.norm else None

    def percent_of_base(layer: LayerAnalysis) -> float | None:
        return None if layer.relative_norm is None else 100 * layer.relative_norm

    size = ("‖Δ‖ / ‖W‖ [%]", percent_of_base) if analysis.knows_base else ("‖Δ‖", lambda x: x.norm)
    error = changed(lambda layer: 100 * layer.reconstruction_error)
    stable_rank = changed(lambda layer: layer.stable_rank)
    maps = [
        HeatMap("size of the change", *size, "viridis", log=True),
        HeatMap(f"error at rank {analysis.rank}", "‖Δ - Δᵣ‖ / ‖Δ‖ [%]", error, "cividis"),
        HeatMap("stable rank", "‖Δ‖² / σ₁²", stable_rank, "viridis", log=True),
    ]
    if ranks is not None:
        rank = changed(lambda layer: ranks[layer.name])
        maps.append(HeatMap("recommended rank", "rank", rank, "cividis", log=True, whole=True))
    return maps


def _median(layers: Sequence[LayerAnalysis], heat_map: HeatMap) -> float | None:
    values = [value for layer in layers if (value := heat_map.value(layer)) is not None]
    return statistics.median(values) if values else None


def _draw(
    figure: Any,
    axes: Any,
    heat_map: HeatMap,
    values: Sequence[Sequence[float | None]],
    depths: Sequence[str],
    kinds: Sequence[str],
    labelled: bool,
) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

    found = [value for row in values for value in row if value is not None]
    positive = [value for value in found if value > 0]
    # A log scale pays only where the values differ by more than a small factor.
    log = heat_map.log and bool(positive) and max(positive) > 5 * min(positive)
    known = positive if log else found
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    equal = not low < high
    if equal:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    scale = LogNorm(low, high) if log else Normalize(low, high)
    write = (lambda value: f"{value:.0f}") if heat_map.whole else short_number
    texts = [["" if value is None else write(value) for value in row] for row in values]
    image = draw_cells(
        axes, values, depths, kinds, heat_map.colours, scale, texts if labelled else None
    )
    axes.set_title(heat_map.title, fontsize=11)
    if not known:
        say(axes, "no layer changed")
        return
    ticks = LogLocator(subs=(1.0, 2.0, 5.0)) if log else MaxNLocator(5, integer=heat_map.whole)
    bar = colour_bar(
        figure,
        image,
        axes,
        heat_map.unit,
        ticks=FixedLocator([known[0]]) if equal else ticks,
        format=FuncFormatter(lambda value, _: f"{value:.4g}"),
    )
    bar.ax.tick_params(rotation=30 if log else 0)
