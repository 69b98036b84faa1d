"""The values that the half-precision types have."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Bits of the fraction and the smallest positive number.
HALVES = {torch.float16: (10, 2.0**-24), torch.bfloat16: (7, 2.0**-133)}
_LARGEST_HALF = torch.finfo(torch.float16).max


def fits(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> bool:
    """Whether every value is one of `dtype`."""
    nearest = rounded(values, dtype)
    if torch.equal(nearest, values):
        return True
    # float16's largest becomes 65536 in bfloat16, and what is larger infinite in float16.
    ends = (values.abs() == 65536) | values.isinf()
    return bool(ends.any()) and torch.equal(nearest, torch.where(ends, nearest, values))


def rounded(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """To the nearest value of `dtype`, the ends of float16's range taken for infinity."""
    if dtype == torch.float16:
        values = values.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return values.to(dtype).to(values.dtype)


def unit_of(size: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Distance of a magnitude to the next one in `dtype`."""
    fraction, smallest = HALVES[dtype]
    exponent = torch.frexp(size.clamp(min=smallest)).exponent
    return torch.ldexp(torch.ones_like(size), exponent - 1 - fraction).clamp(min=smallest)
