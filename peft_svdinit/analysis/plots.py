"""Figures of an analysis and of a synthesis, drawn without pyplot: no global state is touched."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..atomic import replacing
from ..factors import LowRankFactors
from .layers import Analysis, LayerAnalysis, energy_not_held, layer_depth, module_types

# Okabe and Ito's colours, told apart with any colour vision, but for their yellow, too pale on
# white, and their black, too heavy in a filled area.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#454545")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHER = "other"
OTHER_COLOUR = "#B5B5B5"
GUIDE = "#6B6B6B"


def plot_analysis(analysis: Analysis, path: str | os.PathLike, *, title: str = "") -> None:
    """Four panels: errors, energy ratios, spectra, and error against energy, by module type.

    Layers with a zero delta have no spectrum and are left out. Beyond seven module types the rarest
    share one colour.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure(11.5, 8.6)
    kept = (
        f"rank {analysis.rank} keeps {analysis.energy_ratio:.1%} of the energy "
        f"({len(analysis.layers)} layers)"
    )
    figure.suptitle(f"{title}\n{kept}" if title else kept, fontsize=13)
    (errors, energies), (spectra, scatter) = figure.subplots(2, 2)
    groups = _by_type(analysis)
    if not groups:
        for axes in (errors, energies, spectra, scatter):
            axes.text(0.5, 0.5, "no layer changed", ha="center", va="center", color=GUIDE)
            axes.set_axis_off()
    else:
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
        handles, labels = scatter.get_legend_handles_labels()
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=_legend_columns(labels, 11.5),
            frameon=False,
            title="module type",
        )
        for handle in legend.legend_handles:
            handle.set(sizes=[55], alpha=1.0)
    _save(figure, path)


def plot_synthesis(
    original: Mapping[str, LowRankFactors],
    synthesised: Mapping[str, LowRankFactors],
    path: str | os.PathLike,
    *,
    title: str = "Synthesised teacher",
) -> None:
    """Kept and appended singular values of representative layers, and energy shares of all layers.

    The layers shown are the first, the middle and the last of each module type (of the seven
    commonest). The triplets beyond a layer's original rank count as appended.

    Args:
        original: factors of the adapter the teacher was synthesised from.
        synthesised: factors of the teacher, for the same layers.

    Raises:
        ValueError: if the two do not name the same layers, or none.
        ImportError: without matplotlib.
    """
    if set(original) != set(synthesised) or not original:
        differing = sorted(set(original) ^ set(synthesised))[:5]
        raise ValueError(
            "original and synthesised must name the same layers, and at least one; "
            f"only one of them has {differing}"
        )
    names = _names_by_type(synthesised)
    rows = max(len(_representatives(members)) for members in names.values())
    width = max(2.1 * len(names), 8.0)
    figure = _figure(width, 1.9 * rows + 3.6)
    grid = figure.add_gridspec(
        rows + 1, max(len(names), 1), height_ratios=[*[1.0] * rows, 1.35], hspace=0.06
    )

    first = None
    for column, (kind, members) in enumerate(names.items()):
        for row, name in enumerate(_representatives(members)):
            axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
            first = first or axes
            _draw_kept_and_appended(axes, original[name], synthesised[name])
            depth = layer_depth(name)
            axes.set_title(kind if depth is None else f"{kind}, block {depth}", fontsize=9)
            axes.tick_params(labelsize=8, labelleft=column == 0, labelbottom=row == rows - 1)
            if column == 0:
                axes.set_ylabel("σᵢ / σ₁", fontsize=9)
            if row == rows - 1:
                axes.set_xlabel("index i", fontsize=9)
    assert first is not None

    shares = figure.add_subplot(grid[rows, :])
    _draw_appended_shares(shares, original, synthesised, names)
    for axes, place, heading in (
        (first, "outside upper center", title),
        (shares, "outside lower center", "module type"),
    ):
        handles, labels = axes.get_legend_handles_labels()
        if not labels:  # every delta is zero
            continue
        legend = figure.legend(
            handles,
            labels,
            loc=place,
            ncols=_legend_columns(labels, width),
            frameon=False,
            fontsize=9,
            title=heading,
        )
        legend.get_title().set_fontsize(13 if axes is first else 9)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; run "
            "pip install 'peft-svdinit[report]', or ask for no plots"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many entries per row as fit into `width` inches, at about 0.09 inch a character."""
    return max(1, min(len(labels), int(width / (0.09 * max(map(len, labels)) + 0.6))))


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)


def _shown_types(types: Iterable[str]) -> list[str]:
    """At most as many as there are colours: the commonest, in the order of first appearance."""
    counts = Counter(types)
    if len(counts) <= len(COLOURS):
        return list(counts)
    return [kind for kind, _ in counts.most_common(len(COLOURS))]


def _by_type(analysis: Analysis) -> dict[str, list[LayerAnalysis]]:
    types = analysis.module_types
    shown = _shown_types(types[layer.name] for layer in analysis.changed)
    groups = {kind: [] for kind in shown}
    for layer in analysis.changed:
        kind = types[layer.name]
        groups.setdefault(kind if kind in shown else OTHER, []).append(layer)
    return groups


def _styles(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    looks = zip(COLOURS, MARKERS, strict=True)
    return {kind: (OTHER_COLOUR, "*") if kind == OTHER else next(looks) for kind in kinds}


def _draw_distribution(axes: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Stacked histogram in percent, with the median; equal values get one honest narrow bar."""
    percent = {kind: [100 * value for value in group] for kind, group in values.items()}
    everything = [value for group in percent.values() for value in group]
    low, high = min(everything), max(everything)
    pad = max(0.02 * (high - low), 0.005)
    styles = _styles(percent)
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
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.ticklabel_format(axis="x", useOffset=False)
    _tidy(axes)


def _draw_spectra(axes: Any, groups: Mapping[str, list[LayerAnalysis]], rank: int) -> None:
    styles = _styles(groups)
    for kind, layers in groups.items():
        low, median, high = _normalised_quantiles([layer.singular_values for layer in layers])
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
    leftwards = 2 * rank > max(layer.held for group in groups.values() for layer in group)
    axes.annotate(
        f"kept: rank {rank}",
        (rank + 0.5, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if leftwards else 4, -3),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="top",
        fontsize=9,
        color=GUIDE,
    )
    axes.set_yscale("log")
    axes.set_title("lines: median of the layers; bands: 10 to 90 %", fontsize=10)
    axes.set_xlabel("index i of the singular value")
    axes.set_ylabel("σᵢ / σ₁")
    _tidy(axes)


def _normalised_quantiles(spectra: list[list[float]]) -> tuple[list[float], ...]:
    """10, 50 and 90 % of σ_i/σ_1 at each index, over the layers that hold a non-zero σ_i."""
    marks = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = []
    for index in range(max(map(len, spectra))):
        # Below float32 resolution a singular value is rounding noise and would stretch the axis.
        ratios = [s[index] / s[0] for s in spectra if len(s) > index and s[index] > 1e-7 * s[0]]
        if not ratios:
            break
        rows.append(torch.tensor(ratios, dtype=torch.float64).quantile(marks).tolist())
    low, median, high = zip(*rows, strict=True)
    return list(low), list(median), list(high)


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
    styles = _styles(groups)
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
            label=kind,
            zorder=2,
        )
    axes.set_title("curve: error = √(1 - energy); area: share of ‖Δ‖²", fontsize=10)
    axes.set_xlabel("Energy ratio [% of ‖Δ‖²]")
    axes.set_ylabel("Reconstruction error [%]")
    axes.ticklabel_format(useOffset=False)
    _tidy(axes)


def _names_by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of the commonest module types, each list by depth."""
    types = module_types(names)
    shown = _shown_types(types.values())
    grouped = {kind: [name for name in types if types[name] == kind] for kind in shown}
    return {
        kind: sorted(group, key=lambda n: layer_depth(n) or 0) for kind, group in grouped.items()
    }


def _representatives(names: Sequence[str]) -> list[str]:
    """First, middle and last; fewer if there are fewer."""
    return [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})]


def _draw_kept_and_appended(
    axes: Any, original: LowRankFactors, synthesised: LowRankFactors
) -> None:
    before, after = original.S.double().tolist(), synthesised.S.double().tolist()
    scale = after[0] or 1.0
    floor = 1e-7 * scale
    kept = [(i, s / scale) for i, s in enumerate(after, 1) if i <= len(before) and s > floor]
    added = [(i, s / scale) for i, s in enumerate(after, 1) if i > len(before) and s > floor]
    start = [(i, s / scale) for i, s in enumerate(before, 1) if s > floor]
    axes.set_yscale("log")
    axes.minorticks_off()
    for points, marker, size, face, colour, label in (
        (start, "o", 5.0, "none", "#8A8A8A", r"$\sigma$ of the adapter"),
        (kept, "o", 2.4, COLOURS[0], COLOURS[0], r"$\sigma$ kept in the teacher"),
        (added, "s", 2.4, COLOURS[3], COLOURS[3], r"$\sigma$ appended"),
    ):
        axes.plot(
            [i for i, _ in points],
            [value for _, value in points],
            linestyle="none",
            marker=marker,
            markersize=size,
            markerfacecolor=face,
            markeredgecolor=colour,
            markeredgewidth=0.8,
            label=label,
        )
    if not kept:
        axes.text(0.5, 0.5, "zero delta", transform=axes.transAxes, ha="center", color=GUIDE)
    axes.axvline(len(before) + 0.5, color=GUIDE, linestyle="--", linewidth=0.9)
    _tidy(axes)


def _draw_appended_shares(
    axes: Any,
    original: Mapping[str, LowRankFactors],
    synthesised: Mapping[str, LowRankFactors],
    names: Mapping[str, list[str]],
) -> None:
    """Share of each teacher layer's energy that the adapter did not have; zero deltas have none."""
    points = defaultdict(list)
    for kind, members in names.items():
        for position, name in enumerate(members):
            if not synthesised[name].norm:
                continue
            depth = layer_depth(name)
            share = _appended_share(original[name].rank, synthesised[name])
            points[kind].append((position if depth is None else depth, 100 * share))
    styles = _styles(names)
    for kind, pairs in points.items():
        colour, marker = styles[kind]
        axes.plot(
            *zip(*pairs, strict=True),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.1,
            alpha=0.85,
            label=kind,
        )
    axes.set_title("energy of the teacher outside the adapter's triplets", fontsize=10)
    axes.set_xlabel("block")
    axes.set_ylabel("share of ‖Δ‖² [%]")
    places = [place for pairs in points.values() for place, _ in pairs] or [0]
    axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.ticklabel_format(useOffset=False)
    _tidy(axes)


def _appended_share(kept: int, teacher: LowRankFactors) -> float:
    """Of ‖delta‖_F², what the first `kept` triplets do not hold; the norm is not zero."""
    squares = [value * value for value in teacher.S.double().tolist()]
    outside = energy_not_held(squares, teacher.norm) + math.fsum(squares[kept:])
    return min(1.0, outside / teacher.norm**2)
