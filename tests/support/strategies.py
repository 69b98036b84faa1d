"""Hypothesis strategies for matrices, spectra and factors.

A matrix is drawn as a shape, a spectrum and a seed, and built from random orthonormal vectors in
float64, so that its singular values are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_svdinit import LowRankFactors

seeds = st.integers(0, 2**32 - 1)
wide_dtypes = st.sampled_from([torch.float32, torch.float64])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
layer_names = st.from_regex(r"layers\.[0-9]{1,2}\.(q|k|v)_proj", fullmatch=True)


def shapes(largest: int = 16) -> st.SearchStrategy[tuple[int, int]]:
    """(rows, cols), single rows and columns included."""
    sides = st.integers(1, largest)
    return st.tuples(sides, sides)


@st.composite
def spectra(draw: st.DrawFn, count: int) -> list[float]:
    """`count` singular values, descending: decaying, all equal, in tied pairs, low rank or zero."""
    kind = draw(st.sampled_from(["power", "exponential", "flat", "pairs", "low rank", "zero"]))
    scale = draw(st.sampled_from([1e-4, 1.0, 1e3]))
    decay = draw(st.floats(0.2, 2.0))
    if kind == "power":
        values = [(j + 1) ** -decay for j in range(count)]
    elif kind == "exponential":
        values = [2 ** (-decay * j) for j in range(count)]
    elif kind == "flat":
        values = [1.0] * count
    elif kind == "pairs":
        values = [1 / (1 + j // 2) for j in range(count)]
    elif kind == "low rank":
        rank = draw(st.integers(1, count))
        values = [1 / (1 + j) if j < rank else 0.0 for j in range(count)]
    else:
        values = [0.0] * count
    return [scale * value for value in values]


def orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Random float64 matrix with orthonormal columns; cols is at most rows."""
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64)).Q


def matrix_of_spectrum(shape: tuple[int, int], spectrum: list[float], seed: int) -> Tensor:
    """Float64 matrix of this shape with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left = orthonormal(shape[0], len(spectrum), generator)
    right = orthonormal(shape[1], len(spectrum), generator)
    return (left * torch.tensor(spectrum, dtype=torch.float64)) @ right.mT


@st.composite
def matrices(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes, largest: int = 16
) -> Tensor:
    """Matrices of all shapes, spectra and scales."""
    shape = draw(shapes(largest))
    spectrum = draw(spectra(min(shape)))
    return matrix_of_spectrum(shape, spectrum, draw(seeds)).to(draw(dtypes))


@st.composite
def matrices_with_rank(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes, largest: int = 16
) -> tuple[Tensor, int]:
    """A matrix and a rank that it can be truncated to, min(shape) included."""
    matrix = draw(matrices(dtypes, largest))
    smaller = min(matrix.shape)
    return matrix, draw(st.one_of(st.integers(1, smaller), st.just(smaller)))


@dataclass(frozen=True)
class Product:
    """The two sides of a LoRA product."""

    lora_B: Tensor
    lora_A: Tensor


@st.composite
def products(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes, largest: int = 16
) -> Product:
    """B (out, inner) and A (inner, in), inner above out or in and rank deficiency included."""
    rows, inner, cols = (draw(st.integers(1, largest)) for _ in range(3))
    dtype = draw(dtypes)
    left = draw(spectra(min(rows, inner)))
    right = draw(spectra(min(inner, cols)))
    return Product(
        matrix_of_spectrum((rows, inner), left, draw(seeds)).to(dtype),
        matrix_of_spectrum((inner, cols), right, draw(seeds)).to(dtype),
    )


@st.composite
def layer_factors(draw: st.DrawFn, largest: int = 16) -> LowRankFactors:
    """Float32 factors of a delta, all of its triplets or fewer."""
    matrix, rank = draw(matrices_with_rank(st.just(torch.float32), largest))
    return LowRankFactors.from_delta(matrix, rank)


@st.composite
def adapter_factors(draw: st.DrawFn, largest: int = 20, rank: int = 5) -> LowRankFactors:
    """Factors of a B A of full inner rank, as a trained adapter has: nothing is truncated."""
    shape = draw(st.tuples(st.integers(2, largest), st.integers(2, largest)))
    kept = draw(st.integers(1, min(*shape, rank)))
    decay = draw(st.floats(0.0, 1.0))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    spectrum = [scale * (1 + j) ** -decay for j in range(kept)]
    generator = torch.Generator().manual_seed(draw(seeds))
    lora_B = orthonormal(shape[0], kept, generator) * torch.tensor(spectrum, dtype=torch.float64)
    lora_A = orthonormal(shape[1], kept, generator).mT
    return LowRankFactors.from_product(lora_B.float(), lora_A.float())
