"""Exact scaling by powers of two, for matrices near the ends of their dtype's range."""

from __future__ import annotations

from torch import Tensor


def times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2**exponent: exact but for what leaves the normal range.

    In two steps, as the power itself may be beyond the range of a dtype whose subnormal numbers it
    lifts; the first never rounds.
    """
    first = exponent // 2
    return tensor * 2.0**first * 2.0 ** (exponent - first)
