"""Layers of low rank get balanced factors again, or lower ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..files import WrongKind
from ..linalg import svd_of_product
from ..optim import Moments, Moved
from .basis import BasisChange, rebalanced
from .candidates import low_rank_layers
from .layer import LowRankLinear
from .plan import LowRankPlan


@dataclass(frozen=True)
class Changed:
    """A layer with other factors.

    Attributes:
        name: its full name.
        layer: itself.
        change: the factors and what leads to them; None where D and S are trained.
        moved: parameters for the optimizer; the same objects where the rank stayed.
    """

    name: str
    layer: LowRankLinear
    change: BasisChange | None
    moved: Moved


@torch.no_grad()
def shrink_(model: nn.Module, plan: LowRankPlan) -> list[Changed]:
    """Lower the ranks of layers, each to the best approximation of its own product.

    Where D and S are trained that is of the product without D, whose rows weigh alike.

    Raises:
        ValueError: if the plan names a layer that is not of low rank, or a rank that is not lower.
    """
    plan.check(model)
    layers = low_rank_layers(model)
    for name, planned in plan.layers.items():
        if name not in layers:
            raise ValueError(f"layer {name} is dense; factorize_ makes it one of low rank")
        if planned.rank >= layers[name].rank:
            raise ValueError(
                f"layer {name} has rank {layers[name].rank}; shrink_ lowers ranks, got "
                f"{planned.rank}"
            )
    return [_changed(name, layers[name], planned.rank) for name, planned in plan.layers.items()]


@torch.no_grad()
def rebalance_(model: nn.Module) -> list[Changed]:
    """Factors of equal size and orthogonal columns for the products as they are.

    Re-factorising now and then is the cheapest known gain of low-rank training (arXiv:2505.22922).
    Where D and S are trained, U and Vh get orthonormal columns and S the singular values.

    Raises:
        ValueError: if no layer is of low rank.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of low rank")
    return [_changed(name, layer, layer.rank) for name, layer in layers.items()]


def _changed(name: str, layer: LowRankLinear, rank: int) -> Changed:
    if layer.row_norm is not None and layer.sv_norm is not None:
        return _changed_with_norms(name, layer, rank)
    change = rebalanced(layer.U, layer.Vh, rank)
    old = (layer.U, layer.Vh)
    _set(layer, "U", change.U)
    _set(layer, "Vh", change.Vh)

    def carry(moments: Moments, squared: bool) -> Moments:
        # U' = U H and Vh' = G Vh: ∇U' = ∇U Gᵀ and ∇Vh' = Hᵀ ∇Vh.
        G, H = ((each.square() if squared else each).float() for each in (change.G, change.H))
        return moments[0].float() @ G.mT, H.mT @ moments[1].float()

    return Changed(name, layer, change, Moved(name, old, (layer.U, layer.Vh), carry))


def _changed_with_norms(name: str, layer: LowRankLinear, rank: int) -> Changed:
    assert layer.row_norm is not None and layer.sv_norm is not None
    old = (layer.U, layer.Vh, layer.row_norm, layer.sv_norm)
    found = svd_of_product(layer.U * layer.sv_norm, layer.Vh).truncated(rank)
    for part, tensor in (("U", found.U), ("Vh", found.Vh), ("sv_norm", found.S)):
        _set(layer, part, tensor)
    new = (layer.U, layer.Vh, layer.row_norm, layer.sv_norm)

    def carry(moments: Moments, squared: bool) -> Moments:
        raise WrongKind(
            f"layer {name}: moments of factors with trained norms cannot be carried over; use "
            "optimizer_state=drop"
        )

    return Changed(name, layer, None, Moved(name, old, new, carry, vectors=new[2:]))


def _set(layer: LowRankLinear, part: str, tensor: torch.Tensor) -> None:
    """Give a parameter other entries: the same object where the shape stays."""
    parameter: nn.Parameter = getattr(layer, part)
    if parameter.shape == tensor.shape:
        parameter.copy_(tensor)
    else:
        setattr(
            layer, part, nn.Parameter(tensor.to(parameter).contiguous(), parameter.requires_grad)
        )
