"""What one common rank would keep and cost, for a few ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .totals import Analysis

BYTES_PER_PARAMETER = 2  # bfloat16


@dataclass(frozen=True)
class RankRow:
    """All layers at one rank; a layer that holds fewer triplets keeps those it holds.

    Attributes:
        energy: share of Σ‖delta‖_F² kept, in [0, 1].
        error: relative Frobenius error of all layers together.
        parameters: of the LoRA.
        bytes: of its weights in bfloat16.
    """

    rank: int
    energy: float
    error: float
    parameters: int
    bytes: int


def rank_table(analysis: Analysis) -> list[RankRow]:
    """Ranks 1, 2, 4, … and the most triplets that any layer holds."""
    most = max(layer.held for layer in analysis.layers)
    ranks = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [_row(analysis, rank) for rank in (*ranks, most)]


def _row(analysis: Analysis, rank: int) -> RankRow:
    lost = math.hypot(*(layer.truncation_error(rank) for layer in analysis.layers))
    error = min(1.0, lost / analysis.norm) if analysis.norm else 0.0
    parameters = sum(min(rank, layer.held) * sum(layer.shape) for layer in analysis.layers)
    return RankRow(rank, 1 - error**2, error, parameters, BYTES_PER_PARAMETER * parameters)
