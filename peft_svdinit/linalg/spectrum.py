"""What a list of singular values and the exact norm say about a matrix.

The norm is always that of the whole matrix: `singular_values` may be the leading ones only, and
energy measured inside them would be flattering.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_RUN = 1024
_FEW = 1 << 12


def frobenius_norm(matrix: Float[Tensor, "..."]) -> float:
    """‖matrix‖_F: in float64, of more than 4,096 float32 entries to about 1e-6.

    Those are summed in short runs of float32, and the runs in float64: one float32 sum over 10⁷
    squares would be off in the 4th digit, and widening every entry would cost as much as a product
    of a randomised SVD.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    entries = matrix.detach().reshape(-1)
    if entries.numel() <= _FEW:
        norm = float(torch.linalg.vector_norm(entries.double()))
    else:
        total = _sum_of_squares(entries, torch.promote_types(entries.dtype, torch.float32))
        if not 1e-30 < total < 1e30:  # Squares near the ends of float32's range.
            total = _sum_of_squares(entries, torch.float64)
        norm = math.sqrt(total)
    if not math.isfinite(norm):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} has NaN or infinite entries")
    return norm


def _sum_of_squares(entries: Tensor, dtype: torch.dtype) -> float:
    total = 0.0
    for block in entries.split(1 << 22):
        wide = block.to(dtype)
        whole = len(wide) // _RUN * _RUN
        for runs in (wide[:whole].view(-1, _RUN), wide[whole:].view(1, -1)):
            total += torch.linalg.vector_norm(runs, dim=1).double().square().sum().item()
    return total


def energy(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """Share of ‖matrix‖_F² in `singular_values`; 1 for a zero matrix, which loses nothing."""
    if norm == 0:
        return 1.0
    return min(1.0, singular_values.double().square().sum().item() / norm**2)


def relative_error(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """‖matrix − approximation‖_F / ‖matrix‖_F when the approximation keeps `singular_values`."""
    return math.sqrt(1.0 - energy(singular_values, norm))


def stable_rank(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """‖matrix‖_F² / ‖matrix‖_2², between 1 and the rank; 0 for a zero matrix."""
    if norm == 0:
        return 0.0
    return norm**2 / singular_values[0].double().item() ** 2


def rank_for_energy(
    singular_values: Float[Tensor, " held"], norm: float, share: float
) -> int | None:
    """Smallest number of leading triplets that hold `share` of the energy.

    None if the held ones do not reach it. A relative slack of 1e-6 absorbs float32 rounding, so
    that share=1 is reached by a matrix whose triplets are all held.

    Raises:
        ValueError: if `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if norm == 0:
        return 0
    cumulative = singular_values.double().square().cumsum(0)
    reached = (cumulative >= share * norm**2 * (1 - 1e-6)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None
