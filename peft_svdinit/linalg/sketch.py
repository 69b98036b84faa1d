"""The random block that randomised methods begin with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def sketch(
    matrix: Float[Tensor, "rows cols"], width: int, generator: torch.Generator | None
) -> Float[Tensor, "cols width"]:
    """Gaussian columns on the matrix's device; without a generator always the same ones.

    A fresh generator with seed 0 leaves the global random state untouched. Drawn on the
    generator's own device, so that a CPU generator gives the same columns everywhere.
    """
    generator = generator or torch.Generator().manual_seed(0)
    columns = torch.randn(matrix.shape[1], width, generator=generator, device=generator.device)
    return columns.to(matrix)
