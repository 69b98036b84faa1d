"""LoHa (FedPara, arXiv:2108.06098): delta = scaling * (w1_a @ w1_b) ⊙ (w2_a @ w2_b).

The Hadamard product of two products is itself a product, of the row-wise Khatri-Rao product of the
left factors and the column-wise one of the right factors (Proposition 1 of the paper):

    delta[i, j] = Σ_{p,q} (w1_a[i, p] w2_a[i, q]) (w1_b[p, j] w2_b[q, j])

Its inner dimension is r². The scaling is alpha / r in PEFT and LyCORIS alike. The rank and module
dropouts of both act in training only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import LoraProduct, LowRankFactors
from ...linalg import frobenius_norm, truncated_svd
from .forms import (
    Algorithm,
    LayerDelta,
    LayerHeader,
    Parts,
    Shapes,
    count,
    require_parts,
    require_product,
)

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class DenseDelta:
    """A delta whose factored form would be no smaller than itself."""

    matrix: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def factors(self, rank: int | None = None) -> LowRankFactors:
        """Leading triplets; the norm is summed from them and the residual, which is formed."""
        rank = min(rank or min(self.shape), *self.shape)
        U, S, Vh = truncated_svd(self.matrix, rank, method="exact")
        residual = frobenius_norm(self.matrix - (U * S) @ Vh)
        return LowRankFactors(U, S, Vh, norm=math.hypot(frobenius_norm(S), residual))

    def product(self) -> tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]:
        """The matrix and an identity on its smaller side."""
        identity = torch.eye(min(self.shape))
        out, inputs = self.shape
        return (identity, self.matrix) if out < inputs else (self.matrix, identity)


def header(shapes: Shapes) -> LayerHeader:
    """Of the four matrices; see `Algorithm`."""
    require_parts(shapes, PARTS)
    for left, right in (PARTS[:2], PARTS[2:]):
        require_product(shapes, left, right)
    shape = shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    if shape != (shapes["hada_w2_a"][0], shapes["hada_w2_b"][1]):
        raise ValueError(f"its two products must have one shape, but are {dict(shapes)}")
    rank = shapes["hada_w1_b"][0]
    return LayerHeader(
        shape=shape,
        kernel=(),
        rank=min(rank * shapes["hada_w2_b"][0], *shape),
        dim=rank,
        parameters=count(shapes),
    )


def delta(parts: Parts, scaling: float) -> LayerDelta:
    """In factored form where r² is below min(out, in), else dense."""
    w1_a, w1_b, w2_a, w2_b = (parts[part] for part in PARTS)
    inner = w1_b.shape[0] * w2_b.shape[0]
    if inner >= min(w1_a.shape[0], w1_b.shape[1]):
        return DenseDelta((w1_a * scaling @ w1_b) * (w2_a @ w2_b))
    left = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    right = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return LoraProduct(right, left * scaling, 1.0)


LOHA = Algorithm("LoHa", PARTS, header, delta)
