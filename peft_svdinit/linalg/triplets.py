"""Singular triplets and the convention for their signs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class TruncatedSVD(NamedTuple):
    """`matrix ≈ U @ diag(S) @ Vh`: orthonormal columns of `U` and rows of `Vh`, `S` descending."""

    U: Float[Tensor, "rows rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank cols"]

    def truncated(self, rank: int) -> TruncatedSVD:
        """The first `rank` triplets."""
        return TruncatedSVD(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def with_canonical_signs(self) -> TruncatedSVD:
        """Flip pairs of vectors: the largest-magnitude entry of each column of `U` is positive."""
        peaks = self.U.gather(0, self.U.abs().argmax(dim=0, keepdim=True))
        signs = torch.where(peaks < 0, -1.0, 1.0).to(self.U.dtype)
        return TruncatedSVD(self.U * signs, self.S, self.Vh * signs.T)


def widened(matrix: Tensor) -> Tensor:
    """`matrix` in float32 or wider, the precision of all factorisations here."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def check_rank(rank: int, shape: torch.Size | tuple[int, ...]) -> None:
    largest = min(shape)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be in [1, {largest}] for a matrix of shape {tuple(shape)}, got {rank}"
        )
