"""The figure of a mask: which types and blocks got more than their share, what of B it keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...models import module_types
from ..canvas import COLOURS, GUIDE, new_figure, save_figure, shown_types, tidy
from ..cells import MOST_ROWS, by_depth, colour_bar, draw_cells, name_columns, short_number
from .energy import Energy
from .statistics import Group, MaskStatistics
from .tables import BAND

# Cells in grids of at most this many rows and columns are large enough for a number.
_MOST_LABELLED = (34, 12)
# The commonest are drawn; bars beyond these are thinner than a pixel or two.
_MOST_TYPES, _MOST_BARS = 40, 200


def plot_mask(statistics: MaskStatistics, path: str | os.PathLike, *, title: str = "") -> None:
    """Density by block and by module type, of each layer, and the energy of B that is kept.

    A dashed line is the density of the whole mask, and the band around it where 95 % of random
    masks would put each bar. The panel of the energy is left out where no B is known.

    Raises:
        ImportError: without matplotlib.
    """
    energy = statistics.energy
    figure = new_figure(12.5, 8.8, title)
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
    heights = [100 * group.density for group in groups]
    if len(groups) <= _MOST_BARS:
        axes.bar(places, heights, color=COLOURS[0], width=0.72)
    else:
        axes.stairs(
            heights, [place - 0.5 for place in range(len(groups) + 1)], fill=True, color=COLOURS[0]
        )
    axes.axhline(overall, color=GUIDE, linestyle="--", linewidth=1.2)
    band = [100 * BAND * group.deviation for group in groups]
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
    name_columns(axes, [group.name for group in groups], most=16)
    axes.set_xlim(-0.7, len(groups) - 0.3)
    axes.set_xlabel(label)
    axes.set_ylabel("kept [% of B]")
    widest = max(band, default=0.0)
    axes.set_title(
        f"dashed: the whole mask, {overall:.3g} %; band: 95 % of random masks, ± {widest:.2g}",
        fontsize=10,
    )
    tidy(axes, grid="y")


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
    tidy(axes, grid="x")


def _draw_layers(figure: Any, axes: Any, statistics: MaskStatistics) -> None:
    from matplotlib.colors import TwoSlopeNorm

    layers = {layer.name: layer for layer in statistics.layers}
    types = module_types(layers)
    shown = shown_types(types.values(), _MOST_TYPES)
    layers = {name: layer for name, layer in layers.items() if types[name] in shown}
    rows, columns, cells = by_depth(layers, types, MOST_ROWS)
    densities: list[list[float | None]] = []
    for row in rows:
        found = [cells.get((row, column), ()) for column in columns]
        densities.append(
            [100 * sum(x.kept for x in c) / sum(x.size for x in c) if c else None for c in found]
        )
    known = [value for line in densities for value in line if value is not None]
    overall = 100 * statistics.density
    top = max(min(2 * overall, 100.0), *known)
    scale = TwoSlopeNorm(overall, 0.0, top if top > overall else overall + 1)
    labelled = len(rows) <= _MOST_LABELLED[0] and len(columns) <= _MOST_LABELLED[1]
    texts = [["" if x is None else short_number(x) for x in line] for line in densities]
    image = draw_cells(axes, densities, rows, columns, "PuOr_r", scale, texts if labelled else None)
    axes.set_ylabel("block")
    axes.set_title(f"kept of each layer [%]; white: {overall:.3g} %", fontsize=11)
    colour_bar(figure, image, axes, "kept [% of B]")
