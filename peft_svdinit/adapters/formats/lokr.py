"""LoKr: delta = scaling * w1 ⊗ w2, either of them whole or a product of two factors.

The singular triplets of a Kronecker product are the Kronecker products of the triplets:
U = U1 ⊗ U2, V = V1 ⊗ V2, σ = σ_i σ_j (Van Loan and Pitsianis, 1993). So the leading ones come from
two small SVDs, exactly, and the delta is never formed.

Scaling: PEFT multiplies by alpha / r always. LyCORIS divides alpha by the inner dimension of
whichever factor is a product, and ignores alpha (scaling 1) if both w1 and w2 are stored whole: its
constructor then sets alpha to the rank. `LayerHeader.dim` follows LyCORIS. The rank and module
dropouts of both act in training only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import LowRankFactors
from ...linalg import TruncatedSVD, frobenius_norm
from .forms import Algorithm, LayerHeader, Parts, Shapes, count, require_product

PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class KroneckerDelta:
    """`first ⊗ second`, each held by all its triplets."""

    first: LowRankFactors
    second: LowRankFactors

    @property
    def shape(self) -> tuple[int, int]:
        (out, inputs), (more_out, more_in) = self.first.shape, self.second.shape
        return out * more_out, inputs * more_in

    def factors(self, rank: int | None = None) -> LowRankFactors:
        """Leading triplets, by the products of singular values."""
        values = torch.outer(self.first.S.double(), self.second.S.double()).flatten()
        values, order = values.sort(descending=True, stable=True)
        kept = order[:rank]
        i, j = kept // self.second.rank, kept % self.second.rank
        S = values[:rank].to(self.first.S.dtype)
        # From the rounded values and the exact rest, so that rounding is not taken for an error.
        norm = math.hypot(frobenius_norm(S), frobenius_norm(values[len(kept) :]))
        svd = TruncatedSVD(
            _columns(self.first.U[:, i], self.second.U[:, j]),
            S,
            _columns(self.first.Vh[i].mT, self.second.Vh[j].mT).mT,
            norm,
        )
        return LowRankFactors(*svd.with_canonical_signs(), norm=norm)

    def product(self) -> tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]:
        """(U1 S1 ⊗ U2 S2) and (V1ᵀ ⊗ V2ᵀ)."""
        left = _kron(self.first.U * self.first.S, self.second.U * self.second.S)
        return left, _kron(self.first.Vh, self.second.Vh)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """As `torch.kron`, which fails on some strides."""
    blocks = first[:, None, :, None] * second[None, :, None, :]
    return blocks.reshape(len(first) * len(second), -1)


def _columns(first: Tensor, second: Tensor) -> Tensor:
    """Column-wise Kronecker products."""
    return (first[:, None, :] * second[None, :, :]).flatten(0, 1)


def header(shapes: Shapes) -> LayerHeader:
    """Of w1 (a, b) and w2 (c, d, *kernel), whole or as `_a` and `_b`; see `Algorithm`."""
    (out, inputs), rank, dim = _factor(shapes, "lokr_w1")
    (more_out, more_in), more_rank, more_dim = _factor(shapes, "lokr_w2")
    shape = out * more_out, inputs * more_in
    return LayerHeader(
        shape=shape,
        kernel=shapes.get("lokr_w2", ())[2:],
        rank=min(rank * more_rank, *shape),
        dim=dim or more_dim,
        parameters=count(shapes),
    )


def _factor(shapes: Shapes, part: str) -> tuple[tuple[int, int], int, int | None]:
    """((rows, columns), rank at most, inner dimension or None) of w1 or w2."""
    left, right = f"{part}_a", f"{part}_b"
    stored = {name for name in shapes if name == part or name.startswith(f"{part}_")}
    if stored == {part}:
        whole = shapes[part]
        if len(whole) < 2 or 0 in whole or (part == "lokr_w1" and len(whole) > 2):
            raise ValueError(f"{part} must be a matrix, but has shape {whole}")
        rows, columns = whole[0], math.prod(whole[1:])
        return (rows, columns), min(rows, columns), None
    if stored != {left, right}:
        raise ValueError(
            f"it needs {part}, or {left} and {right}, but has {', '.join(sorted(shapes))}"
        )
    if len(shapes[left]) != 2 or len(shapes[right]) != 2:
        raise ValueError(f"{left} and {right} must be matrices, but have {dict(shapes)}")
    require_product(shapes, left, right)
    rows, columns, inner = shapes[left][0], shapes[right][1], shapes[left][1]
    return (rows, columns), min(rows, columns, inner), inner


def delta(parts: Parts, scaling: float) -> KroneckerDelta:
    """The scaling, of either sign, goes into w1."""
    return KroneckerDelta(_triplets(parts, "lokr_w1", scaling), _triplets(parts, "lokr_w2", 1.0))


def _triplets(parts: Parts, part: str, scaling: float) -> LowRankFactors:
    if part in parts:
        matrix = parts[part].flatten(1) * scaling
        return LowRankFactors.from_delta(matrix, min(matrix.shape))
    return LowRankFactors.from_product(parts[f"{part}_a"] * scaling, parts[f"{part}_b"])


LOKR = Algorithm("LoKr", PARTS, header, delta)
