"""What a list of singular values and the exact norm say about a matrix.

The norm is always that of the whole matrix: `singular_values` may be the leading ones only, and
energy measured inside them would be flattering.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .scaling import times_power_of_two

# Float32 singular values and their norm give the energy that is lost to some 1e-7 of the whole:
# no smaller relative error than this can be told from rounding, with 1 − SMALLEST_ERROR² of energy.
SMALLEST_ERROR = 1e-3

_RUN = 1024
_FEW = 1 << 12


def frobenius_norm(matrix: Float[Tensor, "..."]) -> float:
    """‖matrix‖_F: in float64, of more than 4,096 float32 entries to about 1e-6.

    Those are summed in short runs of float32, and the runs in float64: one float32 sum over 10⁷
    squares would be off in the 4th digit, and widening every entry would cost as much as a product
    of a randomised SVD.

    Raises:
        ValueError: if an entry is NaN or infinite, or the norm is beyond float64's range.
    """
    entries = matrix.detach().reshape(-1)
    if entries.numel() <= _FEW:
        norm = float(torch.linalg.vector_norm(entries.double()))
    else:
        total = _sum_of_squares(entries, torch.promote_types(entries.dtype, torch.float32))
        if not 1e-30 < total < 1e30:  # Squares near the ends of float32's range.
            total = _sum_of_squares(entries, torch.float64)
        norm = math.sqrt(total)
    if 1e-140 < norm < 1e140 or not entries.numel():
        return norm
    # Zeros, squares near the ends of float64's range, or entries that are not finite.
    lowest, highest = map(float, entries.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} has NaN or infinite entries")
    largest = max(-lowest, highest)
    if not largest:
        return 0.0
    exponent = math.frexp(largest)[1]
    scaled = math.sqrt(_sum_of_squares(entries, torch.float64, -exponent))
    return norm_times_power_of_two(scaled, exponent)


def norm_times_power_of_two(norm: float, exponent: int) -> float:
    """norm * 2**exponent.

    Raises:
        ValueError: if that is beyond float64's range.
    """
    try:
        return math.ldexp(norm, exponent)
    except OverflowError:
        raise ValueError(
            f"the matrix has a norm of {norm:.3g} * 2^{exponent}, beyond float64's range; scale it "
            "down"
        ) from None


def _sum_of_squares(entries: Tensor, dtype: torch.dtype, exponent: int = 0) -> float:
    """Of the entries times 2**exponent."""
    total = 0.0
    for block in entries.split(1 << 22):
        wide = block.to(dtype)
        if exponent:
            wide = times_power_of_two(wide, exponent)
        whole = len(wide) // _RUN * _RUN
        for runs in (wide[:whole].view(-1, _RUN), wide[whole:].view(1, -1)):
            total += torch.linalg.vector_norm(runs, dim=1).double().square().sum().item()
    return total


def energy(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """Share of ‖matrix‖_F² in `singular_values`; 1 for a zero matrix, which loses nothing."""
    if norm == 0:
        return 1.0
    return min(1.0, (singular_values.double() / norm).square().sum().item())


def relative_error(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """‖matrix − approximation‖_F / ‖matrix‖_F when the approximation keeps `singular_values`."""
    return math.sqrt(1.0 - energy(singular_values, norm))


def stable_rank(singular_values: Float[Tensor, " held"], norm: float) -> float:
    """‖matrix‖_F² / ‖matrix‖_2², between 1 and the rank; 0 for a zero matrix."""
    if norm == 0:
        return 0.0
    return (norm / singular_values[0].double().item()) ** 2


def rank_for_energy(
    singular_values: Float[Tensor, " held"], norm: float, share: float
) -> int | None:
    """Smallest number of leading triplets that hold `share` of the energy.

    None if the held ones do not reach it. A relative slack of 1e-6 (1e-12 for float64 singular
    values) absorbs rounding, so that share=1 is reached by a matrix whose triplets are all held;
    for any other share it is at most 1 % of what may be lost.

    Raises:
        ValueError: if `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if norm == 0:
        return 0
    slack = 1e-12 if singular_values.dtype == torch.float64 else 1e-6
    if share < 1:
        slack = min(slack, 0.01 * (1 - share))
    cumulative = (singular_values.double() / norm).square().cumsum(0)
    reached = (cumulative >= share * (1 - slack)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None
