"""Tables of one mask and of several, with what random masks would have beside every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...masks import LoriMask
from ..markdown import markdown_table
from .chance import Spread
from .overlap import Comparison, MaskOverlap
from .statistics import Group, MaskStatistics
from .words import verdict

# Standard deviations on either side that 95 % of random masks stay within.
BAND = 1.96
_EXTREMES = 5


def spread_table(statistics: MaskStatistics) -> str:
    """How the entries are spread over rows and columns, that is over outputs and rank."""

    def row(what: str, spread: Spread) -> tuple[str, ...]:
        return (
            what,
            f"{spread.lines:,}",
            f"{spread.used:,}",
            f"{spread.random_used:,.0f}",
            f"{spread.half:.1%}",
            f"{spread.random_half:.1%}",
        )

    return markdown_table(
        ("of B", "all", "in use", "random mask", "with half of the entries", "random mask"),
        [row("rows (outputs)", statistics.rows), row("columns (rank)", statistics.columns)],
    )


def energy_table(statistics: MaskStatistics) -> str:
    """What the entries hold of ‖B‖², and which choice of theirs gains it."""
    energy = statistics.energy
    if energy is None:
        return ""
    gain = energy.kept - energy.random
    rank = statistics.size / statistics.rows.lines
    steps = (
        ("random in the layers, as many as here", energy.by_layer, energy.random, ""),
        ("random in the rows, as many as here", energy.by_row, energy.by_layer, f"{1 / rank:.0%}"),
        ("those of the mask", energy.kept, energy.by_row, ""),
    )
    gains = gain > 0.05 * energy.random
    rows = [
        (name, f"{share:.1%}", f"{(share - before) / gain:.0%}" if gains else "-", of_noise)
        for name, share, before, of_noise in steps
    ]
    return markdown_table(
        ("entries", "of ‖B‖²", "of the gain over random", "the same of noise"),
        [
            ("random", f"{energy.random:.1%}", "", ""),
            *rows,
            ("the largest of Gaussian noise", f"{energy.noise:.1%}", "", ""),
        ],
    )


def group_table(name: str, groups: Sequence[Group]) -> str:
    """Density of each group, and how many standard deviations of a random mask it is off."""
    overall = sum(group.kept for group in groups) / sum(group.size for group in groups)

    def off(group: Group) -> str:
        if not group.deviation:
            return "-"
        return f"{(group.density - overall) / group.deviation:+.1f}"

    return markdown_table(
        (name, "entries", "kept", "density", "times its share", "random mask", "deviations"),
        [
            (
                group.name,
                f"{group.size:,}",
                f"{group.kept:,}",
                f"{group.density:.2%}",
                f"{group.share:.2f}",
                f"± {BAND * group.deviation:.2%}",
                off(group),
            )
            for group in groups
        ],
    )


def layer_table(statistics: MaskStatistics) -> str:
    """The fullest and the emptiest layers; all of them if there are few."""
    ordered = sorted(statistics.layers, key=lambda layer: -layer.density)
    few = len(ordered) <= 2 * _EXTREMES
    shown = ordered if few else [*ordered[:_EXTREMES], *ordered[-_EXTREMES:]]
    return markdown_table(
        ("layer", "B", "kept", "density", "rows in use", "columns in use", "energy kept"),
        [
            (
                f"`{layer.name}`",
                f"{layer.shape[0]} x {layer.shape[1]}",
                f"{layer.kept:,}",
                f"{layer.density:.2%}",
                f"{layer.rows.used:,}",
                f"{layer.columns.used:,}",
                "-" if layer.energy is None else f"{layer.energy.kept:.1%}",
            )
            for layer in shown
        ],
    )


def pair_table(comparison: Comparison) -> str:
    """Every pair, beside what chance gives."""

    def entries(overlap: MaskOverlap) -> list[str]:
        if not overlap.shares_A:
            return [verdict(overlap), *["-"] * 3]
        return [
            f"{overlap.both:,} of {overlap.either:,}, {verdict(overlap)}",
            f"{overlap.jaccard:.4f}",
            f"{overlap.random_jaccard:.4f} ± {overlap.random_deviation:.4f}",
            f"{overlap.random_in_layers:.4f}",
        ]

    def deltas(pair: tuple[int, int]) -> list[str]:
        found = comparison.interference.get(pair)
        if found is None or found.cosine is None:
            return ["-"] * 4
        outputs = found.outputs
        shared = "-"
        if outputs is not None:
            shared = f"{outputs.mean_squared:.1%} ({outputs.random_mean_squared:.1%})"
        return [
            f"{found.cosine:+.4f}",
            f"± {found.random_B_cosine:.4f}",
            f"± {found.random_cosine:.4f}",
            shared,
        ]

    labels = comparison.labels
    header = ("pair", "entries in both", "Jaccard", "random", "random per layer", "rows correlate")
    of_deltas = ("cosine of deltas", "random B", "random deltas", "shared outputs (random)")
    with_deltas = bool(comparison.interference)
    return markdown_table(
        (*header, *(of_deltas if with_deltas else ())),
        [
            (
                f"{labels[i]} and {labels[j]}",
                *entries(overlap),
                f"{overlap.row_correlation:+.3f}",
                *(deltas((i, j)) if with_deltas else ()),
            )
            for (i, j), overlap in comparison.overlaps.items()
        ],
    )


def mask_table(masks: Mapping[str, LoriMask], statistics: Mapping[str, MaskStatistics]) -> str:
    """The masks that are compared."""
    return markdown_table(
        ("mask", "made by", "seed of A", "entries", "kept", "rows in use", "half in rows"),
        [
            (
                label,
                masks[label].source.get("kind", "-"),
                masks[label].seed,
                f"{found.size:,}",
                f"{found.kept:,} ({found.density:.2%})",
                f"{found.rows.used / found.rows.lines:.1%}",
                f"{found.rows.half:.1%}",
            )
            for label, found in statistics.items()
        ],
    )


def density_table(groups: Mapping[str, Sequence[Group]]) -> str:
    """Density of the same groups in every mask."""
    return markdown_table(
        ("", *groups),
        [
            (same[0].name, *(f"{100 * group.density:.2f}" for group in same))
            for same in zip(*groups.values(), strict=True)
        ],
    )
