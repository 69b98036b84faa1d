"""Spectra of each module type against those of random deltas of the same shape and norm."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ...factors import Spectrum
from ..canvas import (
    COLOURS,
    GUIDE,
    legend_outside,
    new_figure,
    panels,
    plain,
    save_figure,
    say,
    shortened,
    tidy,
    whole_ticks,
)
from .groups import changed_by_type, quantiles, spike_count
from .layers import LayerAnalysis
from .random_spectrum import random_reference
from .totals import Analysis

MOST_TYPES = 12
COLUMNS = 4
# σ/‖Δ‖ below this is float32 rounding and would stretch the axis.
FLOOR = 1e-6
LONGEST = 28  # letters of a name above a panel


def plot_spectra(analysis: Analysis, path: str | os.PathLike, *, title: str = "") -> None:
    """One panel per module type: σᵢ/‖Δ‖ of its layers, and of random deltas.

    The headings give the median energy at the analysed rank, that of a random delta, and the
    median number of spikes. Zero deltas are left out. Beyond twelve module types the rarest share
    the last panel.

    Raises:
        ImportError: without matplotlib.
    """
    groups = changed_by_type(analysis, MOST_TYPES)
    columns = min(COLUMNS, max(1, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    figure = new_figure(max(3.1 * columns, 6.0), 2.6 * rows + 0.9, title)
    places = panels(figure, max(1, len(groups)), columns, sharex=True, sharey=True)
    if not groups:
        places[0].set_axis_off()
        say(places[0], "no layer changed")
    named = {}
    for place, (axes, (kind, layers)) in enumerate(zip(places, groups.items(), strict=False)):
        _draw(axes, kind, layers, analysis.rank)
        if place % columns == 0:
            axes.set_ylabel("σᵢ / ‖Δ‖")
        if place + columns >= len(groups):
            axes.set_xlabel("index i")
            axes.tick_params(labelbottom=True)
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if named:
        legend_outside(figure, list(named.values()), list(named))
    save_figure(figure, path)


def _draw(axes: Any, kind: str, layers: Sequence[LayerAnalysis], rank: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, median, high = quantiles(
        ([value / layer.norm for value in layer.singular_values] for layer in layers), FLOOR
    )
    index = range(1, len(median) + 1)
    axes.fill_between(index, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(index, median, color=COLOURS[0], linewidth=1.7, label="layers: median, 10 to 90 %")
    _, expected, _ = quantiles((_random(layer) for layer in layers), FLOOR)
    axes.plot(
        range(1, len(expected) + 1),
        expected,
        color=COLOURS[3],
        linewidth=1.4,
        linestyle="--",
        label="random deltas of the same shape, norm and rank",
    )
    axes.axvline(rank + 0.5, color=GUIDE, linestyle=":", linewidth=1.0, label=f"rank {rank}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    whole_ticks(axes.xaxis)
    edge = statistics.median(layer.spikes.edge / layer.norm for layer in layers)
    if edge > FLOOR:
        axes.axhline(
            edge, color=GUIDE, linewidth=0.9, label="edge of the random part; above it: spikes"
        )
    energy = statistics.median(layer.energy_ratio for layer in layers)
    expected_energy = statistics.median(layer.random_energy for layer in layers)
    name = plain(shortened(kind, LONGEST))
    axes.set_title(
        f"{name}, {len(layers)} {'layer' if len(layers) == 1 else 'layers'}\n"
        f"rank {rank}: {energy:.0%} (random {expected_energy:.0%}); spikes: {spike_count(layers)}",
        fontsize=9,
    )
    axes.tick_params(labelsize=8)
    tidy(axes)


def _random(layer: LayerAnalysis) -> list[float]:
    """Expected singular values of a random delta of norm 1, as many as the layer holds."""
    spectrum = Spectrum(
        torch.tensor(layer.singular_values, dtype=torch.float64), layer.norm, layer.shape
    )
    return random_reference(layer.name, spectrum).singular_values(1.0, layer.held)
