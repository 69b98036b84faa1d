"""How much two adapters' deltas get in each other's way: tensors in, numbers out.

All of it works on the factors; no out x in matrix is formed. Each number stands beside what chance
would give, without which a small cosine says nothing: in a space of out * in dimensions any two
matrices are nearly orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg import svd_of_product
from .overlap import SpaceOverlap, SupportOverlap
from .spectrum import ROUNDING


@dataclass(frozen=True)
class ComparableDelta:
    """`scaling * lora_B @ lora_A` in float64, with what comparisons need of it.

    Attributes:
        lora_B: with the scaling.
        norm: ‖delta‖_F.
        outputs, inputs: orthonormal bases of its column and row space, as columns and as rows.
    """

    lora_B: Float[Tensor, "out rank"]
    lora_A: Float[Tensor, "rank in"]
    norm: float
    outputs: Float[Tensor, "out held"]
    inputs: Float[Tensor, "held in"]

    @classmethod
    def of(
        cls,
        lora_B: Float[Tensor, "out rank"],
        lora_A: Float[Tensor, "rank in"],
        scaling: float = 1.0,
    ) -> ComparableDelta:
        """Singular values below 1e-6 of the largest are rounding, and add no direction."""
        left, right = lora_B.double() * scaling, lora_A.double()
        svd = svd_of_product(left, right)
        held = svd.S > ROUNDING * svd.S[0]
        return cls(left, right, svd.norm, svd.U[:, held], svd.Vh[held])


@dataclass(frozen=True, kw_only=True)
class Interference:
    """Two deltas beside each other.

    Attributes:
        norms: ‖D₁‖_F and ‖D₂‖_F.
        inner: ⟨D₁, D₂⟩_F = trace((B₁ᵀ B₂)(A₂ A₁ᵀ)).
        random_cosine: root mean square of the cosine if the deltas were random: 1 / √(out in).
        random_B_cosine: the same if the A are as they are and the entries of both B random,
            ‖A₁ A₂ᵀ‖_F / (√out ‖A₁‖_F ‖A₂‖_F): what a frozen A leaves to chance. Masks of B placed
            at random do not change it.
        outputs, inputs: angles between the column spaces and between the row spaces; None if a
            delta is zero.
        support: of the nonzero entries of both B, where A is shared; columns of B that belong to
            different rows of A have no entries in common.
    """

    norms: tuple[float, float]
    inner: float
    random_cosine: float
    random_B_cosine: float
    outputs: SpaceOverlap | None
    inputs: SpaceOverlap | None
    support: SupportOverlap | None

    @property
    def cosine(self) -> float | None:
        """⟨D₁, D₂⟩ / (‖D₁‖ ‖D₂‖); None if a delta is zero."""
        return _cosine(self.inner, self.norms)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        outputs, inputs, support = self.outputs, self.inputs, self.support
        return {
            "cosine": self.cosine,
            **vars(self),
            "norms": list(self.norms),
            "outputs": asdict(outputs) if outputs else None,
            "inputs": asdict(inputs) if inputs else None,
            "support": support.as_dict() if support else None,
        }


@dataclass(frozen=True, kw_only=True)
class LayerInterference(Interference):
    """Two deltas of one layer.

    Attributes:
        shares_A: whether both A are equal bit by bit.
    """

    shares_A: bool


@dataclass(frozen=True, kw_only=True)
class PairInterference(Interference):
    """Two adapters: the layers that both have, and their deltas as one vector each.

    A layer that an adapter lacks counts as zero; random cosines are for signs that are random in
    every layer; of the spaces it has the largest cosine of any layer, and means over layers.

    Attributes:
        layers: number of layers that both adapters have.
        layers_sharing_A: of these, those with equal A.
    """

    layers: int
    layers_sharing_A: int


def layer_interference(first: ComparableDelta, second: ComparableDelta) -> LayerInterference:
    """Compare two deltas of one layer.

    Raises:
        ValueError: if their shapes differ.
    """
    (out, inputs), other = _shape(first), _shape(second)
    if (out, inputs) != other:
        raise ValueError(f"deltas must have one shape, got {(out, inputs)} and {other}")
    cross = first.lora_A @ second.lora_A.mT
    sizes = float(first.lora_A.norm()) * float(second.lora_A.norm())
    shared = torch.equal(first.lora_A, second.lora_A)
    return LayerInterference(
        norms=(first.norm, second.norm),
        inner=float(((first.lora_B.mT @ second.lora_B) * cross).sum()),
        random_cosine=1 / math.sqrt(out * inputs),
        random_B_cosine=float(cross.norm()) / (math.sqrt(out) * sizes) if sizes else 0.0,
        outputs=SpaceOverlap.of(first.outputs, second.outputs),
        inputs=SpaceOverlap.of(first.inputs.mT, second.inputs.mT),
        shares_A=shared,
        support=SupportOverlap.of(first.lora_B != 0, second.lora_B != 0) if shared else None,
    )


def pair_interference(
    layers: Sequence[LayerInterference], norms: tuple[float, float]
) -> PairInterference:
    """Sum up the layers that two adapters have in common.

    Args:
        layers: any number, none included.
        norms: of each adapter over all of its layers.
    """
    size = norms[0] * norms[1]

    def by_chance(cosines: Sequence[float]) -> float:
        terms = zip(layers, cosines, strict=True)
        spread = math.hypot(*(layer.norms[0] * layer.norms[1] * c for layer, c in terms))
        return spread / size if size else 0.0

    supports = [layer.support for layer in layers if layer.support is not None]
    return PairInterference(
        norms=norms,
        inner=math.fsum(layer.inner for layer in layers),
        random_cosine=by_chance([layer.random_cosine for layer in layers]),
        random_B_cosine=by_chance([layer.random_B_cosine for layer in layers]),
        outputs=_over_layers([layer.outputs for layer in layers]),
        inputs=_over_layers([layer.inputs for layer in layers]),
        support=SupportOverlap.together(supports) if supports else None,
        layers=len(layers),
        layers_sharing_A=sum(layer.shares_A for layer in layers),
    )


def _shape(delta: ComparableDelta) -> tuple[int, int]:
    return delta.lora_B.shape[0], delta.lora_A.shape[1]


def _cosine(inner: float, norms: tuple[float, float]) -> float | None:
    size = norms[0] * norms[1]
    return max(-1.0, min(1.0, inner / size)) if size else None


def _over_layers(overlaps: Sequence[SpaceOverlap | None]) -> SpaceOverlap | None:
    found = [overlap for overlap in overlaps if overlap is not None]
    if not found:
        return None
    return SpaceOverlap(
        max(overlap.largest for overlap in found),
        math.fsum(overlap.mean_squared for overlap in found) / len(found),
        math.fsum(overlap.random_mean_squared for overlap in found) / len(found),
    )
