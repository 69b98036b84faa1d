"""Other factors of one product: balanced, of a lower rank, and what carries over to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg import svd_of_product

# A direction of a singular value below this share of the largest keeps a row of Vh of this size, so
# that its column of U has a gradient: two factors that are both zero never leave zero.
_FLOOR = 1e-6


class BasisChange(NamedTuple):
    """New factors U = old U @ H and Vh = G @ old Vh, up to what a lower rank leaves out."""

    U: Float[Tensor, "out new"]
    Vh: Float[Tensor, "new in"]
    H: Float[Tensor, "old new"]
    G: Float[Tensor, "new old"]


def split(
    U: Float[Tensor, "out rank"], S: Float[Tensor, " rank"], Vh: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """U √S and √S Vh: the factors of least norm for their product."""
    sizes = _sizes(S)
    return U * (S / sizes), sizes[:, None] * Vh


def rebalanced(
    U: Float[Tensor, "out rank"], Vh: Float[Tensor, "rank in"], rank: int | None = None
) -> BasisChange:
    """The balanced factors of U @ Vh, or of its best approximation of a lower rank.

    Exact, through the SVD of the core of two QR decompositions: no out x in matrix is formed.
    """
    found = svd_of_product(U.double(), Vh.double())
    if rank is not None:
        found = found.truncated(rank)
    rank = U.shape[1] if rank is None else rank
    if rank > len(found.S):
        raise ValueError(f"a product of rank {len(found.S)} has no factors of rank {rank}")
    sizes = _sizes(found.S)
    H = (Vh.double() @ found.Vh.mT) / sizes
    # Of a singular value that is zero in all but rounding nothing can be carried over.
    alive = found.S > _FLOOR * found.S[:1]
    inverse = torch.where(alive, sizes / torch.where(alive, found.S, 1.0), 0.0)
    G = inverse[:, None] * (found.U.mT @ U.double())
    new_U, new_Vh = split(found.U, found.S, found.Vh)
    return BasisChange(*(each.to(U.dtype) for each in (new_U, new_Vh, H, G)))


def _sizes(S: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    largest = float(S.max())
    return S.clamp_min(_FLOOR * largest if largest > 0 else 1.0).sqrt()
