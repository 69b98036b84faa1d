"""The exact weighted sum of LoRA deltas, and how far a product is from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import LoraProduct
from ..weighted_sum import Term

LoraTerm = Term[LoraProduct]


def coefficient(term: LoraTerm) -> float:
    """The factor before B @ A."""
    return term.weight * term.delta.scaling


def norm_of_sum(terms: Sequence[LoraTerm]) -> float:
    """‖Σ weight * delta‖_F; see `distance_from_sum`."""
    return _norm([(coefficient(term), term.delta.lora_B, term.delta.lora_A) for term in terms])


def distance_from_sum(
    lora_B: Float[Tensor, "out rank"], lora_A: Float[Tensor, "rank in"], terms: Sequence[LoraTerm]
) -> float:
    """‖B A − Σ weight * delta‖_F in float64, to about 1e-15 of the norms of the summands.

    All of it is one product [B −c₁B₁ …] [A; A₁; …], whose norm is that of its QR core R Tᵀ.
    """
    exact = [(-coefficient(term), term.delta.lora_B, term.delta.lora_A) for term in terms]
    return _norm([(1.0, lora_B, lora_A), *exact])


def _norm(products: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    left = torch.cat([c * B.double() for c, B, _ in products], dim=1)
    right = torch.cat([A.double() for _, _, A in products])
    near = torch.linalg.qr(left, mode="r").R
    far = torch.linalg.qr(right.mT, mode="r").R
    return float(torch.linalg.matrix_norm(near @ far.mT))
