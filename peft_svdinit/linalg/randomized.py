"""Randomised range finding, Halko, Martinsson and Tropp (arXiv:0909.4061)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .product import svd_of_product
from .triplets import TruncatedSVD, check_rank, widened


def randomized_svd(
    matrix: Float[Tensor, "rows cols"],
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Near-optimal rank-`rank` approximation from 2 (power_iterations + 1) products with `matrix`.

    Algorithms 4.4 and 5.1 of the paper: an orthonormal basis Q of (A Aᵀ)^q A Ω, re-orthonormalised
    between products, then the exact SVD of the small matrix Qᵀ A. The right singular vectors are
    those of Qᵀ A; the random basis Ω itself spans nothing of `matrix`, and a factorisation that
    returns it, or scales Y = A Ω by singular values again, is wrong by several times the optimum.

    Args:
        matrix: any finite matrix; not modified.
        rank: number of triplets kept, from 1 to `min(rows, cols)`.
        oversampling: extra columns of the sketch, 5 to 10 in the paper's bounds.
        power_iterations: q above; two bring the error within about 1 % of the optimum on the
            spectra of fine-tuning deltas.
        generator: source of Ω; a fresh one with seed 0 if not given, so that equal inputs give
            equal factors and the global random state is untouched.

    Raises:
        ValueError: if `rank` is out of range, `oversampling` or `power_iterations` negative.

    The exact squared error is ‖A‖_F² − Σ S²: measure energy against ‖A‖_F, never in the sketch.
    """
    check_rank(rank, matrix.shape)
    if oversampling < 0 or power_iterations < 0:
        raise ValueError(
            "oversampling and power_iterations must not be negative, got "
            f"{oversampling} and {power_iterations}"
        )
    wide = widened(matrix)
    rows, cols = wide.shape
    width = min(rank + oversampling, rows, cols)
    generator = generator or torch.Generator().manual_seed(0)
    sketch = torch.randn(cols, width, generator=generator, device=generator.device).to(wide)
    basis = _orthonormal(wide @ sketch)
    for _ in range(power_iterations):
        basis = _orthonormal(wide @ _orthonormal((basis.mT @ wide).mT))
    return svd_of_product(basis, basis.mT @ wide).truncated(rank)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
