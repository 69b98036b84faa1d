"""What the analysis needs of a layer's delta: leading singular values, exact norm and shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

# Float32 singular values give Σσ² to about this relative accuracy; less is not told from zero.
ENERGY_RESOLUTION = 1e-6


class HasSpectrum(Protocol):
    """Anything with a spectrum: `LowRankFactors`, or `Spectrum` without the vectors."""

    @property
    def S(self) -> Float[Tensor, " held"]: ...

    @property
    def norm(self) -> float: ...

    @property
    def shape(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values of a delta, for layers whose singular vectors stay on disk.

    Attributes:
        S: the held singular values, descending.
        norm: exact ‖delta‖_F of the whole delta.
        shape: (out, in).
    """

    S: Float[Tensor, " held"]
    norm: float
    shape: tuple[int, int]


def share_to_lose(energy: float) -> float:
    """Share of the energy that may be lost to keep `energy`.

    With what float32 cannot tell from zero, but at most 1 % of the share itself, so that keeping
    all energy is possible and no other target is missed by more.
    """
    lost = 1 - energy
    return lost + (min(ENERGY_RESOLUTION, 0.01 * lost) if lost else ENERGY_RESOLUTION)


def singular_values(name: str, layer: HasSpectrum) -> list[float]:
    """The held singular values as float64.

    Raises:
        ValueError: naming the layer, if one of them or the norm is not finite.
    """
    values = layer.S.double().tolist()
    if not all(map(math.isfinite, (layer.norm, *values))):
        raise ValueError(f"{name}: singular values and norm must be finite; extract it again")
    return values


def energy_not_held(squares: list[float], norm: float) -> float:
    """norm² minus the squared singular values held; 0 where float32 cannot tell it from zero."""
    missing = norm**2 - math.fsum(squares)
    return missing if missing > ENERGY_RESOLUTION * norm**2 else 0.0


# Singular values below this share of the largest are float32 rounding.
ROUNDING = 1e-6
