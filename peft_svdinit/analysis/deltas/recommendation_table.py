"""The table of recommended ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ...factors import RankRecommendation
from ..cells import by_depth
from ..markdown import markdown_table, span
from .totals import Analysis

_ENDS = {
    "energy": "the target is reached",
    "budget": "the budget is spent",
    "max_rank": "every layer is at the highest rank allowed",
    "held": "every held triplet is used, and an extraction at a higher rank would offer more",
}


def recommendation_table(
    analysis: Analysis, recommendation: RankRecommendation, json_name: str
) -> str:
    """Rank and predicted error of every block and module type, and what they amount to."""
    depths, kinds, cells = by_depth(
        {name: name for name in recommendation.ranks}, analysis.module_types
    )
    rows = [
        (depth, *(_cell(recommendation, cells.get((depth, kind), ())) for kind in kinds))
        for depth in depths
    ]
    return (
        f"{_outcome(recommendation)}\n\n{markdown_table(('block', *kinds), rows)}\n\nRank, and in "
        f'brackets the predicted relative error. `json.load(open("{json_name}"))'
        '["recommendation"]["config"]` is for `LoraConfig`: `r`, `lora_alpha`, `rank_pattern` and '
        "`alpha_pattern`, with alpha = rank in every layer."
    )


def _outcome(recommendation: RankRecommendation) -> str:
    wish = []
    if recommendation.target is not None:
        wish.append(f"a target of {recommendation.target:.1%} of the energy")
    if recommendation.max_parameters is not None:
        wish.append(f"a budget of {recommendation.max_parameters:,} parameters")
    missed = ", the target is **not** reached" if recommendation.reached is False else ""
    errors = recommendation.errors.values()
    within = f" ({min(errors):.2%} to {max(errors):.2%} in its layers)" if errors else ""
    return (
        f"Given {' and '.join(wish)}, {_ENDS[recommendation.limit]}{missed}: "
        f"**{recommendation.energy:.2%}** of Σ‖Δ‖² with {recommendation.parameters:,} parameters; "
        f"predicted relative error is {recommendation.error:.2%} over the whole model{within}. "
        f"As many parameters spent uniformly (rank {recommendation.uniform_rank:.1f}) would keep "
        f"{recommendation.uniform_energy:.2%}."
    )


def _cell(recommendation: RankRecommendation, names: Sequence[str]) -> str:
    """Rank and error of the layers in one cell of the table; their spans if they are several."""
    if not names:
        return ""
    ranks = sorted(recommendation.ranks[name] for name in names)
    errors = sorted(recommendation.errors[name] for name in names)
    return f"{span(ranks[0], ranks[-1])} ({span(f'{errors[0]:.0%}', f'{errors[-1]:.0%}')})"
