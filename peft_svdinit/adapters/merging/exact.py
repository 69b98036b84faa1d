"""Merging without cross terms: the exact sum of the deltas, or its best approximation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...factors import SvdGuided
from ..rounding import Factors
from ..weighted_sum import combined
from .terms import LoraTerm, coefficient


def concatenated(terms: Sequence[LoraTerm]) -> Factors:
    """A = [cᵢ Aᵢ] stacked and B = [Bᵢ]: exact, of the sum of the ranks; in float64."""
    lora_A = torch.cat([coefficient(term) * term.delta.lora_A.double() for term in terms])
    return lora_A, torch.cat([term.delta.lora_B.double() for term in terms], dim=1)


def on_shared_A(terms: Sequence[LoraTerm]) -> Factors:
    """A as it is and B = Σ cᵢ Bᵢ: exact, of the rank of one; in float64.

    Raises:
        ValueError: if an A differs from the first by a bit.
    """
    first = terms[0].delta.lora_A
    for term in terms[1:]:
        if not torch.equal(first, term.delta.lora_A):
            raise ValueError(
                "method shared needs one lora_A in all adapters, but here they differ; use cat, "
                "which is exact at the sum of the ranks, or svd"
            )
    products = [coefficient(term) * term.delta.lora_B.double() for term in terms]
    return first.double(), torch.stack(products).sum(dim=0)


def recompressed(terms: Sequence[LoraTerm], rank: int) -> Factors:
    """The best approximation of the sum of rank `rank` (Eckart-Young), or all that it has."""
    factors = combined(terms).factors(rank)
    init = SvdGuided()(factors, rank=factors.rank, scaling=1.0)
    return init.lora_A, init.lora_B
