"""Slow, obvious float64 twins of what the package computes, and the tolerance of comparisons."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


class Tolerance(TypedDict):
    """Keyword arguments of torch.testing.assert_close."""

    rtol: float
    atol: float


def tolerance(matrix: Tensor) -> Tolerance:
    """Error that a backward stable algorithm may make on `matrix`.

    The package computes in float32 or wider; the error of a factorisation is relative to the
    largest entries of the result, so it is absolute, and grows with the size.
    """
    eps = torch.finfo(torch.promote_types(matrix.dtype, torch.float32)).eps
    scale = float(np.linalg.norm(array(matrix)))
    return Tolerance(rtol=0.0, atol=8 * eps * max(matrix.shape) * scale)


def array(matrix: Tensor) -> np.ndarray:
    """The same values in float64 and numpy."""
    return matrix.detach().double().cpu().numpy()


def singular_values(matrix: Tensor) -> np.ndarray:
    """All singular values, descending."""
    return np.linalg.svd(array(matrix), compute_uv=False)


def truncated(matrix: Tensor, rank: int) -> np.ndarray:
    """The best approximation of this rank, dense."""
    U, S, Vh = np.linalg.svd(array(matrix), full_matrices=False)
    return U[:, :rank] @ np.diag(S[:rank]) @ Vh[:rank]


def frobenius(matrix: Tensor | np.ndarray) -> float:
    """The norm, from its definition."""
    values = array(matrix) if isinstance(matrix, Tensor) else matrix
    return math.sqrt(math.fsum(value * value for value in values.ravel().tolist()))


def discarded(matrix: Tensor, rank: int) -> float:
    """Frobenius norm of what the best approximation of this rank loses (Eckart-Young)."""
    return frobenius(singular_values(matrix)[rank:])


def lora_delta(lora_B: Tensor, lora_A: Tensor, scaling: float = 1.0) -> np.ndarray:
    """The update of a LoRA layer, dense."""
    return scaling * (array(lora_B) @ array(lora_A))


def lora_scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """The factor before B A, from its definition."""
    return alpha / rank**0.5 if rslora else alpha / rank


def decaying_tail(last: float, decay: float, count: int) -> list[float]:
    """The singular values that a synthesised teacher appends to one that ends at `last`."""
    return [last * math.exp(-decay * (j + 1)) for j in range(count)]


def principal_cosines(left: Tensor, right: Tensor) -> np.ndarray:
    """Cosines of the angles between two subspaces given by orthonormal columns."""
    return np.linalg.svd(array(left).T @ array(right), compute_uv=False)


def smallest_rank(squares: list[float], missing: float, limit: float) -> int:
    """Fewest leading triplets beside which no more than `limit` of the energy is lost."""
    rank = len(squares)
    while rank and math.fsum([missing, *squares[rank - 1 :]]) <= limit:
        rank -= 1
    return rank
