"""Tables of one mask and of several, with what random masks would have beside every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...masks import LoriMask
from ..markdown import code, columns_table, markdown_table
from .overlap import Comparison, MaskOverlap
from .statistics import Group, MaskStatistics
from .words import verdict

# Standard deviations on either side that 95 % of random masks stay within.
BAND = 1.96
_EXTREMES = 5


def spread_table(statistics: MaskStatistics) -> str:
    """How the entries are spread over rows and columns, that is over outputs and rank."""
    return columns_table(
        [("rows (outputs)", statistics.rows), ("columns (rank)", statistics.columns)],
        {
            "of B": lambda line: line[0],
            "all": lambda line: f"{line[1].lines:,}",
            "in use": lambda line: f"{line[1].used:,}",
            "in use, random mask": lambda line: f"{line[1].random_used:,.0f}",
            "with half of the entries": lambda line: f"{line[1].half:.1%}",
            "with half, random mask": lambda line: f"{line[1].random_half:.1%}",
        },
    )


def energy_table(statistics: MaskStatistics) -> str:
    """What the entries hold of ‖B‖², and which choice of theirs gains it."""
    energy = statistics.energy
    if energy is None:
        return ""
    gain = energy.kept - energy.random
    worth = gain > 0.05 * energy.random
    rank = statistics.size / statistics.rows.lines
    steps = (
        ("random in the layers, as many as here", energy.random, energy.by_layer, ""),
        ("random in the rows, as many as here", energy.by_layer, energy.by_row, f"{1 / rank:.0%}"),
        ("those of the mask", energy.by_row, energy.kept, ""),
    )
    return markdown_table(
        ("entries", "of ‖B‖²", "of the gain over random", "the same of noise"),
        [
            ("random", f"{energy.random:.1%}", "", ""),
            *(
                (name, f"{after:.1%}", f"{(after - before) / gain:.0%}" if worth else "-", of_noise)
                for name, before, after, of_noise in steps
            ),
            ("the largest of Gaussian noise", f"{energy.noise:.1%}", "", ""),
        ],
    )


def group_table(name: str, groups: Sequence[Group]) -> str:
    """Density of each group, and how many standard deviations of a random mask it is off."""
    overall = sum(group.kept for group in groups) / sum(group.size for group in groups)
    return columns_table(
        groups,
        {
            name: lambda group: group.name,
            "entries": lambda group: f"{group.size:,}",
            "kept": lambda group: f"{group.kept:,}",
            "density": lambda group: f"{group.density:.2%}",
            "times its share": lambda group: f"{group.share:.2f}",
            "random mask": lambda group: f"± {BAND * group.deviation:.2%}",
            "deviations": lambda group: (
                f"{(group.density - overall) / group.deviation:+.1f}" if group.deviation else "-"
            ),
        },
    )


def layer_table(statistics: MaskStatistics) -> str:
    """The fullest and the emptiest layers; all of them if there are few."""
    ordered = sorted(statistics.layers, key=lambda layer: -layer.density)
    few = len(ordered) <= 2 * _EXTREMES
    return columns_table(
        ordered if few else [*ordered[:_EXTREMES], *ordered[-_EXTREMES:]],
        {
            "layer": lambda layer: code(layer.name),
            "B": lambda layer: f"{layer.shape[0]} x {layer.shape[1]}",
            "kept": lambda layer: f"{layer.kept:,}",
            "density": lambda layer: f"{layer.density:.2%}",
            "rows in use": lambda layer: f"{layer.rows.used:,}",
            "columns in use": lambda layer: f"{layer.columns.used:,}",
            "energy kept": lambda layer: f"{layer.energy.kept:.1%}" if layer.energy else "-",
        },
    )


def pair_table(comparison: Comparison) -> str:
    """Every pair, beside what chance gives."""
    labels = comparison.labels
    with_deltas = bool(comparison.interference)
    header = ("pair", "entries in both", "Jaccard", "random", "random per layer", "rows correlate")
    of_deltas = ("cosine of deltas", "random B", "random deltas", "shared outputs (random)")
    rows = []
    for (i, j), overlap in comparison.overlaps.items():
        row = [f"{labels[i]} and {labels[j]}", *_entries(overlap)]
        row.append(f"{overlap.row_correlation:+.3f}")
        rows.append(row + (_deltas(comparison, (i, j)) if with_deltas else []))
    return markdown_table((*header, *(of_deltas if with_deltas else ())), rows)


def _entries(overlap: MaskOverlap) -> list[str]:
    if not overlap.shares_A:
        return [verdict(overlap), *["-"] * 3]
    return [
        f"{overlap.both:,} of {overlap.either:,}, {verdict(overlap)}",
        f"{overlap.jaccard:.4f}",
        f"{overlap.random_jaccard:.4f} ± {overlap.random_deviation:.4f}",
        f"{overlap.random_in_layers:.4f}",
    ]


def _deltas(comparison: Comparison, pair: tuple[int, int]) -> list[str]:
    found = comparison.interference.get(pair)
    if found is None or found.cosine is None:
        return ["-"] * 4
    shared = found.outputs
    return [
        f"{found.cosine:+.4f}",
        f"± {found.random_B_cosine:.4f}",
        f"± {found.random_cosine:.4f}",
        f"{shared.mean_squared:.1%} ({shared.random_mean_squared:.1%})" if shared else "-",
    ]


def mask_table(masks: Mapping[str, LoriMask], statistics: Mapping[str, MaskStatistics]) -> str:
    """The masks that are compared."""
    return columns_table(
        masks,
        {
            "mask": lambda label: label,
            "made by": lambda label: masks[label].source.get("kind", "-"),
            "seed of A": lambda label: masks[label].seed,
            "entries": lambda label: f"{statistics[label].size:,}",
            "kept": lambda label: f"{statistics[label].kept:,} ({statistics[label].density:.2%})",
            "rows in use": lambda label: f"{statistics[label].rows.used:,}",
            "half in rows": lambda label: f"{statistics[label].rows.half:.1%}",
        },
    )


def density_table(groups: Mapping[str, Sequence[Group]]) -> str:
    """Density of the same groups in every mask."""
    rows = zip(*groups.values(), strict=True)
    return markdown_table(
        ("", *groups),
        ([same[0].name, *(f"{100 * group.density:.2f}" for group in same)] for same in rows),
    )
