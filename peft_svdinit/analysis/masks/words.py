"""What a mask is, and what two have in common, in a line each."""

from __future__ import annotations

from ...files import one_line
from ...masks import LoriMask
from .overlap import Comparison, MaskOverlap
from .statistics import MaskStatistics

_CHOSEN = {
    "magnitude": "those of the largest |B| of a trained adapter",
    "gradient": "those of the largest gradient",
    "weighted gradient": "those of the largest |B · gradient|",
    "teacher": "those of the largest |B| of the best B for a teacher's deltas",
    "random": "drawn at random",
    "reference": "chosen by the reference implementation of LoRI",
}
# Standard deviations beyond which a number is no accident, among some hundred of them.
_BEYOND_CHANCE = 4.0


def mask_in_words(mask: LoriMask, statistics: MaskStatistics) -> list[str]:
    """What was chosen, what it keeps, and what its numbers do not mean."""
    kind = one_line(mask.source.get("kind", "an unnamed source"))
    lines = [
        f"{statistics.kept:,} of {statistics.size:,} entries of B in {len(statistics.layers)} "
        f"layers are trained ({statistics.density:.2%}): {_CHOSEN.get(kind, f'chosen by {kind}')}."
    ]
    energy = statistics.energy
    if energy is not None:
        lines.append(
            f"They hold {energy.kept:.1%} of the energy ‖B‖²; random ones would hold "
            f"{energy.random:.1%}, random ones of the same rows {energy.by_row:.1%}, the largest "
            f"of Gaussian noise {energy.noise:.1%}."
        )
    if mask.scope != "global":
        lines.append(
            f"Everything of scope {one_line(mask.scope)} got the same share: differences among "
            "these are rounding, not findings."
        )
    if mask.source.get("same_A") is False:
        lines.append(
            "The entries were found over another A than this mask is for: only how many each layer "
            "and row keeps carries over."
        )
    return lines


def comparison_in_words(comparison: Comparison) -> list[str]:
    """One line per pair."""
    labels = comparison.labels
    lines = []
    for (i, j), overlap in comparison.overlaps.items():
        found = comparison.interference.get((i, j))
        line = f"{labels[i]} and {labels[j]}: "
        if overlap.shares_A:
            line += (
                f"{overlap.both:,} of {overlap.either:,} entries are in both, {verdict(overlap)} "
                f"(Jaccard {overlap.jaccard:.4f}, random {overlap.random_jaccard:.4f} ± "
                f"{overlap.random_deviation:.4f}); "
            )
        else:
            line += f"{verdict(overlap)}; "
        line += f"their rows correlate by {overlap.row_correlation:+.3f}"
        if found is not None and found.cosine is not None:
            line += f"; cosine of their deltas {found.cosine:+.4f} (random B ± "
            line += f"{found.random_B_cosine:.4f})"
        lines.append(f"{line}.")
    return lines


def verdict(overlap: MaskOverlap) -> str:
    """The entries that two masks share, against chance."""
    if not overlap.shares_A:
        return "of different A, over which single entries have nothing in common"
    if not overlap.both:
        return "disjoint"
    distance = overlap.jaccard - overlap.random_jaccard
    if abs(distance) <= _BEYOND_CHANCE * overlap.random_deviation:
        return "as much as chance gives"
    ratio = overlap.jaccard / overlap.random_jaccard
    return f"{'more' if distance > 0 else 'less'} than chance gives, {ratio:.2f} times it"
