"""Intruder dimensions: strong directions of a fine-tuned weight that its base does not have.

After arXiv:2410.21228 (section 4): a left singular vector of the tuned weight, among the `top_k`
of the largest singular values, whose |cosine| with every left singular vector of the base weight is
below `threshold`. The paper finds them in LoRA and not in full fine-tuning, and that they carry
forgetting. PEFT's `reduce_intruder_dimension` has the same defaults, 10 vectors and 0.5.

Both decompositions are exact ones: neighbouring singular values of a trained weight are close, and
an approximation that is good to a percent of the error returns mixtures of their vectors, which
then pass for intruders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import ROUNDING
from ...linalg import frobenius_norm, truncated_svd

TOP_K = 10
THRESHOLD = 0.5


@dataclass(frozen=True)
class LayerIntruders:
    """The leading directions of one tuned weight against those of its base.

    Attributes:
        cosines: largest |cosine| of each leading tuned vector with a left singular vector of the
            base weight, in the order of `values`.
        values: the leading singular values of the tuned weight.
        threshold: below which a vector is an intruder.
    """

    name: str
    cosines: tuple[float, ...]
    values: tuple[float, ...]
    threshold: float

    @property
    def indices(self) -> list[int]:
        """Of the intruders, counted from 1."""
        return [i for i, cosine in enumerate(self.cosines, 1) if cosine < self.threshold]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "intruders": self.indices,
            "cosines": [float(f"{cosine:.4g}") for cosine in self.cosines],
            "singular_values": [float(f"{value:.6g}") for value in self.values],
        }


def find_intruders(
    name: str,
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "tuned_out tuned_in"],
    *,
    top_k: int = TOP_K,
    threshold: float = THRESHOLD,
) -> LayerIntruders:
    """Intruders among the first `top_k` left singular vectors of `tuned`.

    Cost: a full SVD of `base` and the eigenvectors of the smaller Gram matrix of `tuned`.

    Args:
        name: of the layer, for errors and reports.
        base, tuned: the layer's weight before and after.
        top_k: vectors looked at; all of them if there are fewer.
        threshold: in (0, 1].

    Raises:
        ValueError: if the two differ in shape, or an option is out of range.
    """
    if base.shape != tuned.shape:
        raise ValueError(
            f"{name}: base has shape {tuple(base.shape)} and tuned {tuple(tuned.shape)}; they "
            "must be of one architecture"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    smaller = min(base.shape)
    leading, values, _ = truncated_svd(tuned, min(top_k, smaller), method="gram")
    if frobenius_norm(base) == 0:  # no directions, so none to be found again
        cosines = torch.zeros(len(values))
    else:
        known, strengths, _ = truncated_svd(base, smaller, method="exact")
        known = known[:, strengths > ROUNDING * strengths[0]]
        cosines = (leading.mT @ known).abs().amax(dim=1).clamp(max=1)
    return LayerIntruders(
        name, tuple(cosines.double().tolist()), tuple(values.double().tolist()), threshold
    )


def intruder_total(layers: Iterable[LayerIntruders]) -> int:
    """Intruders in all layers together."""
    return sum(len(layer.indices) for layer in layers)


def intruders_as_dict(layers: Sequence[LayerIntruders]) -> dict[str, Any]:
    """JSON-ready: totals first, then the layers by name."""
    return {
        "total": intruder_total(layers),
        "threshold": layers[0].threshold if layers else None,
        "layers": {layer.name: layer.as_dict() for layer in layers},
    }
