"""The figure of a mask: which types and blocks got more than their share, what of B it keeps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ...models import layer_depth, module_types
from ..canvas import COLOURS, GUIDE, new_figure, save_figure, tidy
from .statistics import Energy, Group, MaskStatistics

# Standard deviations on either side that 95 % of random masks stay within.
_BAND = 1.96
# Cells in grids of at most this many rows are tall enough for a number.
_MOST_LABELLED_ROWS = 34


def plot_mask(statistics: MaskStatistics, path: str | os.PathLike, *, title: str = "") -> None:
    """Density by block and by module type, of each layer, and the energy of B that is kept.

    A dashed line is the density of the whole mask, and the band around it where 95 % of random
    masks would put each bar. The panel of the energy is left out where no B is known.

    Raises:
        ImportError: without matplotlib.
    """
    energy = statistics.energy
    figure = new_figure(12.5, 8.8)
    figure.suptitle(title, fontsize=13)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    panels = left.subplots(3 if energy else 2, 1)
    _draw_groups(panels[0], statistics, statistics.blocks, "block")
    _draw_groups(panels[1], statistics, statistics.types, "module type")
    if energy:
        _draw_energy(panels[2], energy)
    _draw_layers(right, right.subplots(), statistics)
    save_figure(figure, path)


def _draw_groups(
    axes: Any, statistics: MaskStatistics, groups: Sequence[Group], label: str
) -> None:
    overall = 100 * statistics.density
    places = range(len(groups))
    axes.bar(places, [100 * group.density for group in groups], color=COLOURS[0], width=0.72)
    axes.axhline(overall, color=GUIDE, linestyle="--", linewidth=1.2)
    band = [100 * _BAND * group.deviation for group in groups]
    edges = [edge for place in places for edge in (place - 0.5, place + 0.5)]
    axes.fill_between(
        edges,
        [max(0.0, overall - width) for width in band for _ in range(2)],
        [overall + width for width in band for _ in range(2)],
        color=COLOURS[1],
        alpha=0.45,
        linewidth=0,
        zorder=3,
    )
    names = [group.name for group in groups]
    step = math.ceil(len(groups) / 16)
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places[::step], names[::step], **(turned if max(map(len, names)) > 4 else {}))
    axes.set_xlim(-0.7, len(groups) - 0.3)
    axes.set_xlabel(label)
    axes.set_ylabel("kept [% of B]")
    widest = max(band, default=0.0)
    axes.set_title(
        f"dashed: the whole mask, {overall:.3g} %; band: 95 % of random masks, ± {widest:.2g}",
        fontsize=10,
    )
    tidy(axes)
    axes.grid(axis="x", visible=False)


def _draw_energy(axes: Any, energy: Energy) -> None:
    bars = {
        "any random mask": energy.random,
        "random, layers as here": energy.by_layer,
        "random, rows as here": energy.by_row,
        "this mask": energy.kept,
        "largest of noise": energy.noise,
    }
    places = range(len(bars))
    colours = [COLOURS[0] if name == "this mask" else GUIDE for name in bars]
    found = axes.barh(places, [100 * value for value in bars.values()], color=colours, height=0.66)
    axes.bar_label(found, [f"{100 * value:.1f} %" for value in bars.values()], padding=4)
    axes.set_yticks(places, list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, min(118, 118 * max(bars.values())))
    axes.set_xlabel("kept [% of ‖B‖²]")
    axes.set_title("energy of the calibrated B that the entries hold", fontsize=10)
    tidy(axes)
    axes.grid(axis="y", visible=False)


def _draw_layers(figure: Any, axes: Any, statistics: MaskStatistics) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    kinds = module_types(layer.name for layer in statistics.layers)
    columns = list(dict.fromkeys(kinds.values()))
    depths = {layer.name: layer_depth(layer.name) for layer in statistics.layers}
    numbered = sorted({depth for depth in depths.values() if depth is not None})
    rows: list[int | None] = [*numbered, *([None] if None in depths.values() else [])]
    kept = [[0] * len(columns) for _ in rows]
    sizes = [[0] * len(columns) for _ in rows]
    for layer in statistics.layers:
        row, column = rows.index(depths[layer.name]), columns.index(kinds[layer.name])
        kept[row][column] += layer.kept
        sizes[row][column] += layer.size
    densities = [
        [100 * k / n if n else math.nan for k, n in zip(*pair, strict=True)]
        for pair in zip(kept, sizes, strict=True)
    ]
    known = [value for row in densities for value in row if not math.isnan(value)]
    overall = 100 * statistics.density
    top = max(min(2 * overall, 100.0), *known)
    scale = TwoSlopeNorm(overall, 0.0, top if top > overall else overall + 1)
    colours = colormaps["PuOr_r"].with_extremes(bad="#E9E9E9")
    image = axes.imshow(densities, aspect="auto", cmap=colours, norm=scale, interpolation="none")
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, **(turned if len(columns) > 1 else {}))
    step = math.ceil(len(rows) / 34)
    names = ["-" if depth is None else str(depth) for depth in rows]
    axes.set_yticks(range(0, len(rows), step), names[::step])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("block")
    axes.set_title(f"kept of each layer [%]; white: {overall:.3g} %", fontsize=11)
    if len(rows) <= _MOST_LABELLED_ROWS and len(columns) <= 12:
        _write_values(axes, densities, colours, scale)
    bar = figure.colorbar(image, ax=axes, location="bottom", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("kept [% of B]")


def _write_values(axes: Any, rows: list[list[float]], colours: Any, scale: Any) -> None:
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            if math.isnan(value):
                continue
            red, green, blue, _ = colours(scale(value))
            # Luminance of Rec. 709 decides between dark and light letters.
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            text = f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
