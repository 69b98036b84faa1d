"""The exact weighted sum of LoRA deltas, and how far a product is from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import LoraProduct


@dataclass(frozen=True)
class Term:
    """`weight * delta`, one summand of a layer.

    Attributes:
        adapter: index of the adapter that it comes from.
    """

    adapter: int
    weight: float
    delta: LoraProduct

    @property
    def coefficient(self) -> float:
        """The factor before B @ A."""
        return self.weight * self.delta.scaling


def norm_of_sum(terms: Sequence[Term]) -> float:
    """‖Σ weight * delta‖_F; see `distance_from_sum`."""
    return _norm([(term.coefficient, term.delta.lora_B, term.delta.lora_A) for term in terms])


def distance_from_sum(
    lora_B: Float[Tensor, "out rank"], lora_A: Float[Tensor, "rank in"], terms: Sequence[Term]
) -> float:
    """‖B A − Σ weight * delta‖_F in float64, to about 1e-15 of the norms of the summands.

    All of it is one product [B −c₁B₁ …] [A; A₁; …], whose norm is that of its QR core R Tᵀ.
    """
    exact = [(-term.coefficient, term.delta.lora_B, term.delta.lora_A) for term in terms]
    return _norm([(1.0, lora_B, lora_A), *exact])


def _norm(products: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    left = torch.cat([c * B.double() for c, B, _ in products], dim=1)
    right = torch.cat([A.double() for _, _, A in products])
    near = torch.linalg.qr(left, mode="r").R
    far = torch.linalg.qr(right.mT, mode="r").R
    return float(torch.linalg.matrix_norm(near @ far.mT))
