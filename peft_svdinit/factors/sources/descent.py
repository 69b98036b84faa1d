"""From gradients to a step: directions of descent whose length is relative to each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import nn

from ...linalg import frobenius_norm
from ..low_rank import LowRankFactors
from .targets import named_layers

Form = Literal["orthogonalised", "plain"]
FORMS: tuple[Form, ...] = get_args(Form)


def weight_norms(model: nn.Module, factors: Mapping[str, LowRankFactors]) -> dict[str, float]:
    """‖W‖_F of the layers that have factors, one weight in memory at a time."""
    return {
        name: frobenius_norm(layer.weight()) for name, layer in named_layers(model, factors).items()
    }


def descent_directions(
    gradients: Mapping[str, LowRankFactors],
    norms: Mapping[str, float],
    *,
    rank: int | Mapping[str, int],
    form: Form = "orthogonalised",
) -> dict[str, LowRankFactors]:
    """Deltas along minus the gradients, each as large as its weight: ‖delta‖_F = ‖W‖_F.

    "orthogonalised" is −‖W‖_F U_r V_rᵀ / √r, all directions at one size, as in a step of Muon;
    "plain" is −‖W‖_F U_r S_r V_rᵀ / ‖S_r‖, the direction of LoRA-One (arXiv:2502.01235), whose own
    sizes are relative to σ_1 of the gradient instead. `scaled` by a step of `line_search` they are
    factors for start="delta". Directions without a gradient get none: a layer whose gradient is
    zero keeps a zero delta.

    Args:
        gradients: as `gradient_factors` gives them, of at least `rank` triplets where the layer
            has so many.
        norms: ‖W‖_F by layer, see `weight_norms`.
        rank: triplets per layer, or of each layer; the rank of the adapter.
        form: see above.

    Raises:
        ValueError: if `form` is unknown or `rank` out of range.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    directions = {}
    for name, gradient in gradients.items():
        wanted = rank if isinstance(rank, int) else rank[name]
        held = gradient.truncated(min(wanted, *gradient.shape))
        alive = held.S > torch.finfo(held.S.dtype).eps * held.S[0]
        sizes = alive.to(held.S) if form == "orthogonalised" else held.S * alive
        length = frobenius_norm(sizes)
        S = sizes * (norms[name] / length) if length else sizes
        directions[name] = LowRankFactors(-held.U, S, held.Vh, norms[name] if length else 0.0)
    return directions


def scaled(factors: Mapping[str, LowRankFactors], step: float) -> dict[str, LowRankFactors]:
    """The deltas times `step`.

    Raises:
        ValueError: if `step` is not positive and finite.
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step must be positive and finite, got {step}")
    return {
        name: LowRankFactors(layer.U, layer.S * step, layer.Vh, layer.norm * step)
        for name, layer in factors.items()
    }
