"""How the moments of a dense weight's gradient follow its factors, and theirs the dense weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..optim import Moments, Moved
from .layer import LowRankLinear


def to_factors(name: str, weight: nn.Parameter, layer: LowRankLinear) -> Moved:
    """The parameters of `layer` in the place of a dense weight."""
    vectors = tuple(norm for norm in (layer.row_norm, layer.sv_norm) if norm is not None)

    def carry(moments: Moments, squared: bool) -> Moments:
        return _moments_of_factors(layer, moments[0], squared)

    return Moved(name, (weight,), (layer.U, layer.Vh, *vectors), carry, vectors)


def to_dense(name: str, layer: LowRankLinear, weight: nn.Parameter) -> Moved:
    """A dense weight in the place of factors, whose moments do not tell its own."""
    norms = tuple(norm for norm in (layer.row_norm, layer.sv_norm) if norm is not None)

    def carry(moments: Moments, squared: bool) -> Moments:
        raise ValueError(
            f"layer {name}: moments of factors are not those of their product; drop them"
        )

    return Moved(name, (layer.U, layer.Vh, *norms), (weight,), carry)


@torch.no_grad()
def _moments_of_factors(
    layer: LowRankLinear, moment: Float[Tensor, "rows cols"], squared: bool
) -> tuple[Tensor, ...]:
    """Moments of the gradients of U, Vh (D and S) from one of the gradient G of W.

    ∇U = diag(D) G Vhᵀ diag(S), ∇Vh = (diag(D) U diag(S))ᵀ G, ∇D = rowsum(G ⊙ U S Vh) and
    ∇S = diag(Uᵀ diag(D) G Vhᵀ).
    """
    G = (moment.mT if layer.transposed else moment).float()

    def coefficient(tensor: Tensor) -> Tensor:
        wide = tensor.detach().float()
        return wide.square() if squared else wide

    of_U, of_Vh = G @ coefficient(layer.Vh).mT, coefficient(layer.left).mT @ G
    if layer.row_norm is None or layer.sv_norm is None:
        return of_U, of_Vh
    D, S = coefficient(layer.row_norm), coefficient(layer.sv_norm)
    inner = coefficient((layer.U * layer.sv_norm) @ layer.Vh)
    of_S = (D[:, None] * of_U * coefficient(layer.U)).sum(dim=0)
    return D[:, None] * of_U * S, of_Vh, (G * inner).sum(dim=1), of_S
