"""One weight as a product of rank r: the nearest to it, or the nearest in what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..factors import LowRankFactors, part_of_weight
from ..linalg import frobenius_norm, truncated_svd

RowNormalise = Literal["none", "norms", "sums"]
ROW_NORMALISERS: tuple[RowNormalise, ...] = get_args(RowNormalise)
# Share of the mean second moment that is added to each, as CorDA does: few batches say little of
# the directions that their inputs hardly have.
_DAMPING = 0.01
# A row whose entries cancel has a sum that says nothing of its size.
_LEAST_SUM = 0.05
# Over the optimum in the norm of the outputs.
_TOLERANCE = 1.001


@dataclass(frozen=True)
class Approximation:
    """W ≈ diag(D) U diag(S) Vh; D is None where rows were not normalised.

    Attributes:
        error: ‖W − approximation‖_F / ‖W‖_F.
    """

    U: Float[Tensor, "out rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank in"]
    D: Float[Tensor, " out"] | None
    error: float


def approximation(
    weight: Float[Tensor, "out in"],
    rank: int,
    *,
    moments: Float[Tensor, "in in"] | None = None,
    row_normalise: RowNormalise = "none",
) -> Approximation:
    """The best approximation of rank `rank`, in the Frobenius norm of W or of its outputs.

    Without `moments`, ‖W − W'‖_F is least (Eckart-Young). With the inputs' second moments
    C = E[x xᵀ] = L Lᵀ, it is E‖(W − W')x‖² = ‖(W − W')L‖_F²: its minimum is U Uᵀ W with the left
    singular vectors U of W L (arXiv:2403.07378; CorDA, arXiv:2406.05223, takes those of W C). C
    gets 1 % of its mean on the diagonal.

    With `row_normalise` all of that is done to diag(D)⁻¹ W, which weighs rows by their own size:
    D are the rows' norms, or as DBC-DAC has it their sums, with the norm in place of a sum that is
    below a twentieth of it, for sums may be zero.

    Raises:
        ValueError: if the rank is out of range, or an entry is not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must be in [1, {min(weight.shape)}] for a weight of {tuple(weight.shape)}, got "
            f"{rank}"
        )
    D = _row_sizes(weight, row_normalise)
    scaled = weight if D is None else weight / D[:, None]
    if moments is None:
        found = part_of_weight(scaled, rank)
    else:
        U = truncated_svd(scaled @ _root(moments).to(scaled), rank, tolerance=_TOLERANCE).U
        found = LowRankFactors.from_product(U, U.mT @ scaled)
    product = found.dense() if D is None else found.dense() * D[:, None]
    norm = frobenius_norm(weight)
    error = frobenius_norm(weight - product) / norm if norm else 0.0
    return Approximation(found.U, found.S, found.Vh, D, error)


def _row_sizes(
    weight: Float[Tensor, "out in"], row_normalise: RowNormalise
) -> Float[Tensor, " out"] | None:
    if row_normalise not in ROW_NORMALISERS:
        raise ValueError(
            f"row_normalise must be one of {', '.join(ROW_NORMALISERS)}, got {row_normalise!r}"
        )
    if row_normalise == "none":
        return None
    norms = torch.linalg.vector_norm(weight, dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if row_normalise == "norms":
        return norms
    sums = weight.sum(dim=1)
    return torch.where(sums.abs() >= _LEAST_SUM * norms, sums, norms)


def _root(moments: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """L of C = L Lᵀ."""
    wide = moments.to(torch.float64, copy=True)
    mean = wide.diagonal().mean()
    wide.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    return torch.linalg.cholesky(wide)
