"""How the delta of one layer is factorised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...linalg import Method, truncated_svd
from ...models import layer_seed
from ..low_rank import LowRankFactors


@dataclass(frozen=True)
class Factorisation:
    """Dense delta to factors, equal bit by bit whichever layers are done before or after.

    Attributes:
        rank: most triplets kept, all that a smaller layer has.
        energy: share of ‖delta‖_F² at which fewer triplets do, or None; see `truncated_svd`.
        error: or relative Frobenius error, likewise.
        method, tolerance: of `truncated_svd`, where neither of the two is given.
        seed: of all randomness; a layer's draw depends on it and the layer's name alone.
        device: where the factorisation runs; the factors come back to the CPU.
    """

    rank: int
    energy: float | None = None
    error: float | None = None
    method: Method = "auto"
    tolerance: float = 1.003
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device={self.device!r} cannot be used: {reason}") from error

    def __call__(self, name: str, delta: Float[Tensor, "out in"]) -> LowRankFactors:
        """Factors of the layer `name`; a zero delta has one triplet of nothing.

        Raises:
            ValueError: if the delta is not finite; names the layer.
        """
        try:
            svd = truncated_svd(
                delta.to(self.device),
                min(self.rank, *delta.shape),
                energy=self.energy,
                error=self.error,
                method=self.method,
                tolerance=self.tolerance,
                generator=torch.Generator().manual_seed(layer_seed(self.seed, name)),
            )
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        if not svd.norm:
            svd = svd.truncated(1)
        return LowRankFactors(*(part.cpu() for part in svd), norm=svd.norm)
