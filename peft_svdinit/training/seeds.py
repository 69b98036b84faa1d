"""Seeds that every generator of a training takes: torch's, Python's and numpy's."""

from __future__ import annotations

from collections.abc import Sequence

from .names import check_different

_MOST = 2**32 - 1  # of numpy


def check_seed(argument: str, seed: int) -> None:
    """Raise ValueError for a seed that some generator does not take."""
    if not 0 <= seed <= _MOST:
        raise ValueError(f"{argument} must be in 0..{_MOST}, got {seed}")


def check_seeds(argument: str, seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, each of them once and one that can be."""
    check_different(argument, seeds)
    for seed in seeds:
        check_seed(argument, seed)
