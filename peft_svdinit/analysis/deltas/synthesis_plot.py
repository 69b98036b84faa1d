"""The figure of a synthesised teacher: what was kept of the adapter and what was appended."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...factors import LowRankFactors, energy_not_held
from ...models import layer_depth, module_types
from ..canvas import (
    COLOURS,
    GUIDE,
    legend_outside,
    new_figure,
    plain,
    save_figure,
    say,
    shortened,
    shown_types,
    styles_of,
    tidy,
    whole_ticks,
)

_LONGEST = 20  # letters of a name above a panel


def plot_synthesis(
    original: Mapping[str, LowRankFactors],
    synthesised: Mapping[str, LowRankFactors],
    path: str | os.PathLike,
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
    figure = new_figure(width, 1.9 * rows + 2.9)
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
            title = plain(shortened(kind, _LONGEST))
            axes.set_title(title if depth is None else f"{title}, block {depth}", fontsize=9)
            axes.tick_params(
                which="both", labelsize=8, labelleft=column == 0, labelbottom=row == rows - 1
            )
            if column == 0:
                axes.set_ylabel("σᵢ / σ₁", fontsize=9)
            if row == rows - 1:
                axes.set_xlabel("index i", fontsize=9)
    assert first is not None

    shares = figure.add_subplot(grid[rows, :])
    _draw_appended_shares(shares, original, synthesised, names)
    handles, labels = first.get_legend_handles_labels()
    legend_outside(figure, handles, labels, "Synthesised teacher", at="upper")
    handles, labels = shares.get_legend_handles_labels()
    if labels:  # not every delta is zero
        legend_outside(figure, handles, labels, "module type")
    save_figure(figure, path)


def _names_by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of the commonest module types, each list by depth."""
    types = module_types(names)
    shown = shown_types(types.values())
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
    for points, marker, size, face, colour, label in (
        (start, "o", 5.0, "none", "#8A8A8A", "singular values of the adapter"),
        (kept, "o", 2.4, COLOURS[0], COLOURS[0], "kept in the teacher"),
        (added, "s", 2.4, COLOURS[3], COLOURS[3], "appended"),
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
    if kept:
        axes.axvline(len(before) + 0.5, color=GUIDE, linestyle="--", linewidth=0.9)
    else:
        say(axes, "zero delta")
    tidy(axes)


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
    styles = styles_of(names)
    for kind, pairs in points.items():
        colour, marker = styles[kind]
        axes.plot(
            *zip(*pairs, strict=True),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.1,
            alpha=0.85,
            label=plain(shortened(kind)),
        )
    axes.set_title("energy of the teacher outside the adapter's triplets", fontsize=10)
    axes.set_xlabel("block")
    axes.set_ylabel("share of ‖Δ‖² [%]")
    places = [place for pairs in points.values() for place, _ in pairs] or [0]
    axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
    axes.set_ylim(bottom=0)
    whole_ticks(axes.xaxis)
    axes.ticklabel_format(useOffset=False)
    tidy(axes)


def _appended_share(kept: int, teacher: LowRankFactors) -> float:
    """Of ‖delta‖_F², what the first `kept` triplets do not hold; the norm is not zero."""
    squares = [value * value for value in teacher.S.double().tolist()]
    outside = energy_not_held(squares, teacher.norm) + math.fsum(squares[kept:])
    return min(1.0, outside / teacher.norm**2)
