"""The figure of an analysis: errors, energies and spectra by module type."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
    styles_of,
    tidy,
    whole_ticks,
)
from .groups import changed_by_type, quantiles
from .layers import LayerAnalysis
from .totals import Analysis


def plot_analysis(analysis: Analysis, path: str | os.PathLike, *, title: str = "") -> None:
    """Four panels: errors, energy ratios, spectra, and error against energy, by module type.

    Layers with a zero delta have no spectrum and are left out. Beyond seven module types the rarest
    share one colour.

    Raises:
        ImportError: without matplotlib.
    """
    kept = (
        f"rank {analysis.rank} keeps {analysis.energy_ratio:.1%} of the energy "
        f"({len(analysis.layers)} layers)"
    )
    figure = new_figure(11.5, 8.2, f"{title}\n{kept}" if title else kept)
    groups = changed_by_type(analysis, len(COLOURS))
    if not groups:
        (axes,) = panels(figure, 1, 1)
        axes.set_axis_off()
        say(axes, "no layer changed")
    else:
        errors, energies, spectra, scatter = panels(figure, 4, 2)
        _draw_distribution(
            errors,
            {kind: [layer.reconstruction_error for layer in g] for kind, g in groups.items()},
            "Reconstruction error, relative Frobenius norm [%]",
        )
        _draw_distribution(
            energies,
            {kind: [layer.energy_ratio for layer in g] for kind, g in groups.items()},
            f"Energy ratio at rank {analysis.rank} [% of ‖Δ‖²]",
        )
        _draw_spectra(spectra, groups, analysis.rank)
        _draw_error_against_energy(scatter, groups)
        legend = legend_outside(figure, *scatter.get_legend_handles_labels(), title="module type")
        for handle in legend.legend_handles:
            handle.set(sizes=[55], alpha=1.0)
    save_figure(figure, path)


def _draw_distribution(axes: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Stacked histogram in percent, with the median; equal values get one honest narrow bar."""
    percent = {kind: [100 * value for value in group] for kind, group in values.items()}
    everything = [value for group in percent.values() for value in group]
    low, high = min(everything), max(everything)
    pad = max(0.02 * (high - low), 0.005)
    styles = styles_of(percent)
    axes.hist(
        list(percent.values()),
        bins=min(30, max(8, math.isqrt(4 * len(everything)))),
        range=(max(low - pad, 0.0), min(high + pad, 100.0)),
        stacked=True,
        color=[styles[kind][0] for kind in percent],
        edgecolor="white",
        linewidth=0.4,
    )
    median = statistics.median(everything)
    axes.axvline(median, color=GUIDE, linestyle="--", linewidth=1.2)
    axes.set_title(f"dashed: median {median:.3g} %; range {low:.3g} to {high:.3g} %", fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("layers")
    whole_ticks(axes.yaxis)
    axes.ticklabel_format(axis="x", useOffset=False)
    tidy(axes)


def _draw_spectra(axes: Any, groups: Mapping[str, list[LayerAnalysis]], rank: int) -> None:
    styles = styles_of(groups)
    for kind, layers in groups.items():
        # Below float32 resolution a singular value is rounding noise and would stretch the axis.
        low, median, high = quantiles((_normalised(layer) for layer in layers), floor=1e-7)
        index = range(1, len(median) + 1)
        colour, marker = styles[kind]
        axes.fill_between(index, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            index,
            median,
            color=colour,
            linewidth=1.6,
            marker=marker,
            markersize=4,
            markevery=max(1, len(median) // 8),
        )
    axes.axvline(rank + 0.5, color=GUIDE, linestyle="--", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_title(f"median of the layers and 10 to 90 %; dashed: rank {rank}", fontsize=10)
    axes.set_xlabel("index i of the singular value")
    whole_ticks(axes.xaxis)
    axes.set_ylabel("σᵢ / σ₁")
    tidy(axes)


def _normalised(layer: LayerAnalysis) -> list[float]:
    return [value / (layer.singular_values[0] or 1.0) for value in layer.singular_values]


def _draw_error_against_energy(axes: Any, groups: Mapping[str, list[LayerAnalysis]]) -> None:
    layers = [layer for group in groups.values() for layer in group]
    total = math.fsum(layer.norm**2 for layer in layers)
    energies = [100 * layer.energy_ratio for layer in layers]
    pad = max(0.06 * (max(energies) - min(energies)), 0.05)
    low, high = max(min(energies) - pad, 0.0), min(max(energies) + pad, 100.0)

    # Denser towards the right, where the curve falls steeply.
    curve = [high - (high - low) * (step / 200) ** 2 for step in range(201)]
    axes.plot(
        curve,
        [100 * math.sqrt(1 - energy / 100) for energy in curve],
        color=GUIDE,
        linewidth=1.0,
        zorder=1,
    )
    styles = styles_of(groups)
    for kind, group in groups.items():
        colour, marker = styles[kind]
        axes.scatter(
            [100 * layer.energy_ratio for layer in group],
            [100 * layer.reconstruction_error for layer in group],
            # An average layer gets 36 square points.
            s=[12 + 24 * layer.norm**2 / total * len(layers) for layer in group],
            color=colour,
            marker=marker,
            alpha=0.75,
            edgecolor="white",
            linewidth=0.4,
            label=plain(shortened(kind)),
            zorder=2,
        )
    axes.set_title("curve: error = √(1 - energy); area: share of ‖Δ‖²", fontsize=10)
    axes.set_xlabel("Energy ratio [% of ‖Δ‖²]")
    axes.set_ylabel("Reconstruction error [%]")
    axes.ticklabel_format(useOffset=False)
    tidy(axes)
