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
    OTHER,
    legend_columns,
    new_figure,
    save_figure,
    shown_types,
    tidy,
)
from .layers import Analysis, LayerAnalysis
from .random_spectrum import random_reference

MOST_TYPES = 12
COLUMNS = 4
# σ/‖Δ‖ below this is float32 rounding and would stretch the axis.
FLOOR = 1e-6


def plot_spectra(analysis: Analysis, path: str | os.PathLike, *, title: str = "") -> None:
    """One panel per module type: σᵢ/‖Δ‖ of its layers, and of random deltas.

    The headings give the median energy at the analysed rank, that of a random delta, and the
    median number of spikes. Zero deltas are left out. Beyond twelve module types the rarest share
    the last panel.

    Raises:
        ImportError: without matplotlib.
    """
    groups = _groups(analysis)
    columns = min(COLUMNS, max(1, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    figure = new_figure(max(3.1 * columns, 6.0), 2.6 * rows + 1.5)
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = [axes for line in grid for axes in line]
    if not groups:
        panels[0].text(0.5, 0.5, "no layer changed", ha="center", va="center", color=GUIDE)
        panels[0].set_axis_off()
    else:
        for axes, (kind, layers) in zip(panels, groups.items(), strict=False):
            _draw(axes, kind, layers, analysis.rank)
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        for place, axes in enumerate(panels[: len(groups)]):
            if place % columns == 0:
                axes.set_ylabel("σᵢ / ‖Δ‖")
            if place + columns >= len(groups):
                axes.set_xlabel("index i")
                axes.tick_params(labelbottom=True)
        named = {
            label: handle
            for axes in panels[: len(groups)]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            named.values(),
            named.keys(),
            loc="outside lower center",
            ncols=legend_columns(list(named), figure.get_figwidth()),
            frameon=False,
            fontsize=9,
        )
    save_figure(figure, path)


def _groups(analysis: Analysis) -> dict[str, list[LayerAnalysis]]:
    kinds = [analysis.module_types[layer.name] for layer in analysis.changed]
    shown = shown_types(kinds, MOST_TYPES)
    groups: dict[str, list[LayerAnalysis]] = {kind: [] for kind in shown}
    for kind, layer in zip(kinds, analysis.changed, strict=True):
        groups.setdefault(kind if kind in shown else OTHER, []).append(layer)
    return groups


def _draw(axes: Any, kind: str, layers: Sequence[LayerAnalysis], rank: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, median, high = _quantiles(
        [[value / layer.norm for value in layer.singular_values] for layer in layers]
    )
    index = range(1, len(median) + 1)
    axes.fill_between(index, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(index, median, color=COLOURS[0], linewidth=1.7, label="layers: median, 10 to 90 %")
    _, expected, _ = _quantiles([_random(layer) for layer in layers])
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
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    edge = statistics.median(layer.spikes.edge / layer.norm for layer in layers)
    if edge > FLOOR:
        axes.axhline(
            edge, color=GUIDE, linewidth=0.9, label="edge of the random part; above it: spikes"
        )
    energy = statistics.median(layer.energy_ratio for layer in layers)
    expected_energy = statistics.median(layer.random_energy for layer in layers)
    spikes = statistics.median(layer.spikes.count for layer in layers)
    bound = "" if all(layer.spikes.complete for layer in layers) else "≥ "
    axes.set_title(
        f"{kind}, {len(layers)} {'layer' if len(layers) == 1 else 'layers'}\n"
        f"rank {rank}: {energy:.0%} (random {expected_energy:.0%}); spikes: {bound}{spikes:g}",
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


def _quantiles(spectra: list[list[float]]) -> tuple[list[float], ...]:
    """10, 50 and 90 % at each index, over the layers that hold a σ there."""
    marks = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = []
    for index in range(max(map(len, spectra))):
        values = [s[index] for s in spectra if len(s) > index and s[index] > FLOOR]
        if not values:
            break
        rows.append(torch.tensor(values, dtype=torch.float64).quantile(marks).tolist())
    low, median, high = zip(*rows, strict=True)
    return list(low), list(median), list(high)
