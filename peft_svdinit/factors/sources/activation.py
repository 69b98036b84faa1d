"""What the layers are given as a source: directions of inputs (EVA), or weights seen by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...linalg import frobenius_norm, truncated_svd
from ..low_rank import LowRankFactors
from .batches import Batch, held_batches
from .shared_inputs import POSITIONS, Positions, input_covariances
from .targets import TargetLayer, target_layers
from .weight import PARTS, Part, part_of_weight

Weighting = Literal["none", "weight"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
# CorDA adds this share of the mean second moment to each.
_DAMPING = 0.01
# Of the error in squared singular values, whose spectrum is steep: directions need the care.
_TOLERANCE = 1.001


def activation_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    rank: int,
    weighting: Weighting = "none",
    part: Part = "principal",
    target_modules: str | Sequence[str] = "all-linear",
    positions: Positions = "attended",
    memory_gb: float = 4.0,
) -> dict[str, LowRankFactors]:
    """Factors from the covariances of the layers' inputs over `batches`.

    weighting="none": Vᵀ holds the leading right singular vectors of the centred inputs, S their
    singular values over √tokens, and U is zero, for inputs say nothing of outputs. For
    start="subspace", which is EVA (arXiv:2410.07170) at uniform ranks; other starts refuse them.

    weighting="weight": CorDA (arXiv:2406.05223) takes the SVD W C = U S Vᵀ of the weight times the
    inputs' second moments C (with 1 % of their mean on the diagonal), keeps the `part` with the
    largest singular values (its instruction-previewed mode) or the smallest (knowledge-preserved),
    and starts from U_r S_r V_rᵀ C⁻¹. That product is U_r U_rᵀ W, so that nothing is inverted here;
    it is returned by its own triplets, of norm ‖W‖_F. Take it at the rank of the adapter. For
    start="reference".

    Under ZeRO-3 and FSDP2 all processes call it with the same batches.

    Args:
        model: the base model, on the device that shall compute.
        batches: mappings of the model's arguments; as many as shall count.
        rank: triplets per layer, at most min(out, in) of a layer.
        weighting: see above.
        part: of weighting="weight".
        target_modules: "all-linear", a regular expression, or names and name endings.
        positions: which tokens count: all but padding, or ("labelled", as in EVA) those with a
            label.
        memory_gb: limit of the covariances held at a time (4 bytes times in² for each distinct
            input: layers that are given the same tensor, such as q, k and v, share one). If all
            need more, layers are taken in groups and the batches read once per group.

    Raises:
        ValueError: if an option is unknown, there are no batches, or processes that the model is
            split between have different ones.
        RuntimeError: if a layer was given no input.

    Memory: `memory_gb`; hidden states are never kept. Time: a forward pass per batch and group.
    """
    for argument, value, known in (
        ("weighting", weighting, WEIGHTINGS),
        ("part", part, PARTS),
        ("positions", positions, POSITIONS),
    ):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    if weighting == "none" and part != "principal":
        raise ValueError('part="minor" needs weighting="weight"')
    layers = target_layers(model, target_modules)
    held = held_batches(batches, model)
    factors: dict[str, LowRankFactors] = {}
    for sharing, covariance in input_covariances(
        model,
        layers,
        held,
        centred=weighting == "none",
        positions=positions,
        memory_gb=memory_gb,
    ):
        if weighting == "none":
            factors.update(_directions(covariance, sharing, rank))
        else:
            factors.update(_weighted(covariance, sharing, rank, part))
    return {name: factors[name] for name in layers}


def _directions(
    covariance: Float[Tensor, "in in"], layers: Sequence[TargetLayer], rank: int
) -> dict[str, LowRankFactors]:
    """EVA's, one decomposition for all layers of the covariance."""
    trace = max(float(covariance.diagonal().sum(dtype=torch.float64)), 0.0)
    widest = max(min(rank, layer.out_features, layer.in_features) for layer in layers)
    _, squares, Vh = truncated_svd(covariance, widest, tolerance=_TOLERANCE)
    S = squares.clamp_min(0).sqrt()
    found = {}
    for layer in layers:
        kept = min(rank, layer.out_features, layer.in_features)
        U = S.new_zeros(layer.out_features, kept)
        found[layer.name] = LowRankFactors(U, S[:kept], Vh[:kept].clone(), trace**0.5)
    return found


def _weighted(
    moments: Float[Tensor, "in in"], layers: Sequence[TargetLayer], rank: int, part: Part
) -> dict[str, LowRankFactors]:
    """CorDA's, for all layers of these inputs."""
    moments.diagonal().add_(_DAMPING * moments.diagonal().mean())
    found = {}
    for layer in layers:
        kept = min(rank, layer.out_features, layer.in_features)
        weight = layer.weight()
        U = part_of_weight(weight @ moments, kept, part).U
        product = LowRankFactors.from_product(U, U.mT @ weight)
        found[layer.name] = replace(product, norm=frobenius_norm(weight))
    return found
