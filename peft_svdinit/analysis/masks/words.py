"""What a mask says, and what several have in common, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ...masks import LoriMask
from .chance import Spread
from .overlap import Comparison, MaskOverlap
from .statistics import Energy, Group, MaskStatistics

_CHOSEN = {
    "magnitude": "those of the largest |B| of a trained adapter",
    "gradient": "those of the largest gradient",
    "weighted gradient": "those of the largest |B · gradient|",
    "teacher": "those of the largest |B| of the best B for a teacher's deltas",
    "random": "drawn at random",
    "reference": "chosen by the reference implementation of LoRI",
}
# Scopes that leave nothing to be found about layers or types.
_FIXED_SCOPES = {
    "matrix": "every matrix",
    "row": "every row",
    "layer": "every block",
    "type": "every module type",
}
# Standard deviations beyond which a density is no accident, among some hundred of them.
_BEYOND_CHANCE = 4.0


def mask_in_words(mask: LoriMask, statistics: MaskStatistics) -> list[str]:
    """What was chosen, who got more than their share, how far from random, and what it keeps."""
    kind = str(mask.source.get("kind", "an unnamed source"))
    sentences = [
        f"Of {statistics.size:,} entries of B in {len(statistics.layers)} layers "
        f"{statistics.kept:,} are trained ({statistics.density:.2%}): "
        f"{_CHOSEN.get(kind, f'chosen by {kind}')}.",
        *_scope_in_words(mask),
        _groups_in_words("module type", statistics.types, statistics.density),
        _groups_in_words("block", statistics.blocks, statistics.density),
        _spread_in_words("rows", "outputs", statistics.rows),
        _spread_in_words("columns", "rank", statistics.columns),
    ]
    if statistics.energy is not None:
        rank = statistics.size / statistics.rows.lines
        sentences += _energy_in_words(statistics.energy, rank)
    if mask.source.get("same_A") is False:
        sentences.append(
            "The entries were found over another A than the one this mask is for. Only how many "
            "entries each layer and each row keeps carries over; their columns are as good as "
            "random."
        )
    return [sentence for sentence in sentences if sentence]


def _scope_in_words(mask: LoriMask) -> list[str]:
    if mask.scope == "global":
        return []
    fixed = _FIXED_SCOPES.get(mask.scope, f"every run of entries of scope {mask.scope}")
    return [
        f"The scope {mask.scope} gives {fixed} the same share: differences among these are "
        "rounding, not findings."
    ]


def _groups_in_words(what: str, groups: Sequence[Group], density: float) -> str:
    if len(groups) < 2:
        return ""
    ordered = sorted(groups, key=lambda group: -group.share)
    most, least = ordered[0], ordered[-1]
    outside = sum(
        abs(group.density - density) > _BEYOND_CHANCE * group.deviation for group in groups
    )
    band = 1.96 * max(group.deviation for group in groups)
    if not outside:
        return (
            f"All {len(groups)} {what}s have the share that a random mask would give them "
            f"({density:.2%} ± {band:.2%})."
        )
    return (
        f"Of {len(groups)} {what}s, {what} {most.name} got the most, {most.share:.2f} times its "
        f"share ({most.density:.1%}), and {what} {least.name} the least, {least.share:.2f} times "
        f"({least.density:.1%}); {outside} differ from {density:.1%} by more than chance allows "
        f"(a random mask: ± {band:.2%})."
    )


def _spread_in_words(what: str, meaning: str, spread: Spread) -> str:
    return (
        f"{spread.used:,} of {spread.lines:,} {what} ({meaning}) have a trained entry (random "
        f"mask: {spread.random_used:,.0f}), and half of the entries are in the fullest "
        f"{spread.half:.1%} of the {what} (random mask: {spread.random_half:.1%})."
    )


def _energy_in_words(energy: Energy, rank: float) -> list[str]:
    gain = energy.kept - energy.random
    sentences = [
        f"The mask holds {energy.kept:.1%} of the energy ‖B‖² of the B it is compared with; a "
        f"random mask would hold {energy.random:.1%}."
    ]
    if gain <= 0.05 * energy.random:
        return sentences
    parts = [
        (energy.by_layer - energy.random) / gain,
        (energy.by_row - energy.by_layer) / gain,
        (energy.kept - energy.by_row) / gain,
    ]
    verdict = (
        "B is concentrated beyond that"
        if energy.kept > energy.noise
        else "up to that is what choosing the largest gives in any case"
    )
    return [
        *sentences,
        f"The largest entries of Gaussian noise, as many, would hold {energy.noise:.1%}: "
        f"{verdict}.",
        f"Of the gain over a random mask {parts[0]:.0%} is in how many entries each layer keeps, "
        f"{parts[1]:.0%} in how many each row of B keeps (of noise {1 / rank:.0%}), and "
        f"{parts[2]:.0%} in which entries of the row. The last part is of use over the same A "
        "only: with another A the columns of B mean other directions.",
    ]


def comparison_in_words(comparison: Comparison) -> list[str]:
    """One paragraph per pair."""
    return [
        _pair_in_words(comparison, comparison.labels[i], comparison.labels[j], (i, j))
        for i, j in comparison.overlaps
    ]


def _pair_in_words(comparison: Comparison, first: str, second: str, pair: tuple[int, int]) -> str:
    overlap = comparison.overlaps[pair]
    words = [f"**{first} and {second}**", *_overlap_in_words(overlap)]
    found = comparison.interference.get(pair)
    if found is not None and found.cosine is not None:
        words.append(
            f"Their deltas have cosine {found.cosine:+.4f}; two random B over these A would have "
            f"±{found.random_B_cosine:.4f}, two random deltas ±{found.random_cosine:.4f}."
        )
    if found is not None and found.outputs is not None:
        words.append(
            f"Their output directions share {found.outputs.mean_squared:.1%} (mean squared cosine "
            f"of the principal angles; random spaces {found.outputs.random_mean_squared:.1%})."
        )
    return f"{words[0]}: {' '.join(words[1:])}"


def _overlap_in_words(overlap: MaskOverlap) -> list[str]:
    rows = f"The densities of their rows correlate by {overlap.row_correlation:+.3f}."
    if not overlap.shares_A:
        return [
            "They belong to different A, over which single entries have nothing to do with each "
            "other.",
            rows,
        ]
    distance = overlap.jaccard - overlap.random_jaccard
    verdict = "as much as chance gives"
    if abs(distance) > _BEYOND_CHANCE * overlap.random_deviation:
        ratio = overlap.jaccard / overlap.random_jaccard
        verdict = f"{'more' if distance > 0 else 'less'} than chance gives, {ratio:.2f} times it"
    if not overlap.both:
        verdict = "they are disjoint"
    return [
        f"{overlap.both:,} of {overlap.either:,} entries are in both, Jaccard "
        f"{overlap.jaccard:.4f}: {verdict} ({overlap.random_jaccard:.4f} ± "
        f"{overlap.random_deviation:.4f} for random masks; {overlap.random_in_layers:.4f} if only "
        "the layers keep as many entries as they do).",
        rows,
    ]
