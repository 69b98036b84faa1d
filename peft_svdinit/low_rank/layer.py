"""A linear layer whose weight is the product of two thin matrices, both trained."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..models import whole_shape
from .product_on_demand import ProductOnDemand


class LowRankLinear(nn.Module):
    """x ↦ x Wᵀ + bias with W = diag(D) U diag(S) Vh of rank r, in place of a dense layer.

    D and S are folded into U and Vh unless they are to be trained apart, when they are parameters
    of their own: `row_norm` and `sv_norm`, names by which the Trainer spares them weight decay.
    A layer of (out, in) costs r (out + in) multiplications per token in place of out · in.

    Args:
        U: (out, rank).
        Vh: (rank, in).
        bias: (out), kept as the parameter that it is.
        row_norm: D, (out).
        sv_norm: S, (rank).
        transposed: whether it replaces a Conv1D, whose `weight` is (in, out).

    Raises:
        ValueError: if the shapes do not belong together.
    """

    bias: nn.Parameter | None
    row_norm: nn.Parameter | None
    sv_norm: nn.Parameter | None

    def __init__(
        self,
        U: Float[Tensor, "out rank"],
        Vh: Float[Tensor, "rank in"],
        bias: nn.Parameter | None = None,
        *,
        row_norm: Float[Tensor, " out"] | None = None,
        sv_norm: Float[Tensor, " rank"] | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        rows, rank = U.shape
        wrong = Vh.shape[0] != rank
        for vector, length in ((bias, rows), (row_norm, rows), (sv_norm, rank)):
            wrong |= vector is not None and tuple(vector.shape) != (length,)
        if wrong or (row_norm is None) != (sv_norm is None):
            raise ValueError(
                f"U {tuple(U.shape)} and Vh {tuple(Vh.shape)} must share their rank, a bias and "
                "row_norm have the length of U's columns and sv_norm the rank, both norms or none"
            )
        self.transposed = transposed
        self.U, self.Vh = _parameter(U), _parameter(Vh)
        self.register_parameter("row_norm", None if row_norm is None else _parameter(row_norm))
        self.register_parameter("sv_norm", None if sv_norm is None else _parameter(sv_norm))
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return whole_shape(self.Vh)[1]

    @property
    def out_features(self) -> int:
        return whole_shape(self.U)[0]

    @property
    def nf(self) -> int:
        """`out_features` by Conv1D's name."""
        return self.out_features

    @property
    def rank(self) -> int:
        return whole_shape(self.U)[1]

    @property
    def left(self) -> Tensor:
        """diag(D) U diag(S), (out, rank): W = left @ Vh."""
        if self.row_norm is None or self.sv_norm is None:
            return self.U
        return self.U * self.sv_norm * self.row_norm[:, None]

    @property
    def weight(self) -> Tensor:
        """W, of the shape that the dense layer's has; differentiable, and formed when used."""
        shape = (self.out_features, self.in_features)
        return ProductOnDemand.of(self._product, shape[::-1] if self.transposed else shape, self.U)

    def _product(self) -> Tensor:
        # Its dtype is that of U, as a dense layer's weight has one under autocast as well.
        with torch.autocast(self.U.device.type, enabled=False):
            product = self.left @ self.Vh
        return product.mT if self.transposed else product

    def forward(self, x: Tensor) -> Tensor:
        # No shapes in the types: a compiler would trace what checks them.
        return F.linear(F.linear(x, self.Vh), self.left, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if f"{prefix}weight" in state_dict:
            # An error even of a load that is not strict, as the Trainer's are.
            errors = arguments[-1]
            errors.append(
                f"{prefix}weight is dense, and the layer is of low rank: load_low_rank reads the "
                "factors beside a dense checkpoint; a Trainer does with "
                "LowRankCheckpointsCallback or RankSwitchCallback"
            )

    def extra_repr(self) -> str:
        kind = ", trained D and S" if self.row_norm is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{kind}"
        )

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The layer that this one replaces, nn.Linear or Conv1D, with W as its weight."""
        with torch.device("meta"):
            module: nn.Module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        module.weight = nn.Parameter(self._product().contiguous(), self.U.requires_grad)
        if self.bias is not None:
            module.bias = self.bias
        return module.train(self.training)


def _parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own memory, trained unless it is given as a frozen parameter."""
    trained = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), trained)
