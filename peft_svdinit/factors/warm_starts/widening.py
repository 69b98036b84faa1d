"""Factors at any rank: fewer triplets, or more that add nothing and are free to learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...linalg import random_complement
from ...models import layer_seed
from ..low_rank import LowRankFactors


def at_rank(name: str, factors: LowRankFactors, rank: int, seed: int) -> LowRankFactors:
    """The leading `rank` triplets; where fewer are held, all of them and further ones of value 0.

    Those have random orthonormal vectors, orthogonal to the ones held: a start from them is the
    same delta, and in its further directions A is not zero while B is, as in a new LoRA.

    Args:
        name: of the layer.
        factors: of its delta; the norm stays.
        rank: at most min(out, in), see `check_rank`.
        seed: of the further vectors; a layer's depend on it and its name alone.
    """
    if rank <= factors.rank:
        return factors.truncated(rank)
    generator = torch.Generator().manual_seed(layer_seed(seed, name))
    more = rank - factors.rank
    left = random_complement(factors.U, more, generator)
    right = random_complement(factors.Vh.mT, more, generator)
    return LowRankFactors(
        U=torch.cat([factors.U, left], dim=1),
        S=torch.cat([factors.S, factors.S.new_zeros(more)]),
        Vh=torch.cat([factors.Vh, right.mT]),
        norm=factors.norm,
    )


def check_rank(rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless every (out, in) layer can have `rank` triplets."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not shapes:
        return
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise ValueError(
            f"rank={rank} is above the {min(shape)} triplets that any delta of layer {name} "
            f"has, whose weight is {shape} (out, in); lower it"
        )
