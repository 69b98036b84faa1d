"""The singular values a random delta would have: what a spectrum is read against.

Two kinds of random delta have the shape and the norm of a given one. `RandomDelta` has independent
entries of one variance; the singular values of such an m x n matrix follow Marchenko and Pastur's
law (Math. USSR Sb. 1, 457, 1967; section 3.1 of arXiv:1103.2221), between noise * |√m - √n| and
noise * (√m + √n). `RandomAdapter` is the product of two Gaussian matrices, out x inner and
inner x in: what a LoRA holds that learnt nothing. Against `RandomDelta` every LoRA would be all
structure, for no better reason than its rank.

With p = min(m, n), c = p / max(m, n) and λ = σ² / (noise² max(m, n)) = 1 + c + 2√c cos θ, Marchenko
and Pastur's law has a closed form on both of its scales: the share of singular values above λ is
(2/π) [(1+c)θ/4c - sin θ/2√c - (1-c)/2c · atan((1-√c)/(1+√c) · tan(θ/2))], and their share of the
energy is (θ - sin θ cos θ)/π.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...factors import ROUNDING, HasSpectrum, energy_not_held, singular_values

# 99.9 % of the Tracy-Widom law for real matrices (β = 1), and how far that is from its mean in
# standard deviations.
TRACY_WIDOM = 3.2724
DEVIATIONS = 3.53

DRAWS = 64


@dataclass(frozen=True)
class RandomDelta:
    """Independent entries of one variance, in a matrix of `shape` (out, in)."""

    shape: tuple[int, int]

    def largest(self, noise: float) -> float:
        """What the largest singular value exceeds in one of a thousand random deltas.

        Tracy and Widom's law about the upper edge (Johnstone, Ann. Statist. 29, 295, 2001), with
        the centring that is accurate to second order (Ma, arXiv:1203.0839, theorem 2).
        """
        rows, cols = (math.sqrt(size - 0.5) for size in self.shape)
        scale = (rows + cols) * (1 / rows + 1 / cols) ** (1 / 3)
        return noise * math.sqrt((rows + cols) ** 2 + TRACY_WIDOM * scale)

    def energy(self, rank: int) -> float:
        """Expected share of ‖delta‖_F² in the first `rank` triplets."""
        return _energy_of_delta(self.shape, min(rank, *self.shape))

    def singular_values(self, norm: float, count: int) -> list[float]:
        """Expected leading ones, at most as many as there are, of a delta of norm `norm`.

        Value i is the root mean square of the law's i-th of min(out, in) equal shares.
        """
        return (norm * _spectrum_of_delta(self.shape, min(count, *self.shape))).tolist()

    def energy_above(self, shares: Tensor) -> Tensor:
        """Share of the energy in the given shares of the singular values, from the largest."""
        angles = self._angles(shares.double())
        return (angles - angles.sin() * angles.cos()) / math.pi

    def _angles(self, shares: Tensor) -> Tensor:
        """θ above which the given shares of the singular values lie, by bisection."""
        low, high = torch.zeros_like(shares), torch.full_like(shares, math.pi)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._share_above(middle) < shares
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _share_above(self, angle: Tensor) -> Tensor:
        c = min(self.shape) / max(self.shape)
        root = math.sqrt(c)
        turned = torch.atan((1 - root) / (1 + root) * torch.tan(angle / 2))
        area = (1 + c) * angle / (4 * c) - angle.sin() / (2 * root) - (1 - c) / (2 * c) * turned
        return 2 / math.pi * area


# Layers of one shape, which a model has many of, share these.
@lru_cache(maxsize=256)
def _energy_of_delta(shape: tuple[int, int], rank: int) -> float:
    return float(RandomDelta(shape).energy_above(torch.tensor([rank / min(shape)])))


@lru_cache(maxsize=256)
def _spectrum_of_delta(shape: tuple[int, int], count: int) -> Tensor:
    """Leading singular values of a delta of norm 1."""
    places = torch.arange(count + 1, dtype=torch.float64)
    shares = RandomDelta(shape).energy_above(places / min(shape)).diff()
    return shares.clamp(min=0).sqrt()


@dataclass(frozen=True)
class RandomAdapter:
    """`lora_B @ lora_A` of independent Gaussian entries, of rank `inner` below min(shape).

    Sampled, 64 times and always the same ones: at ranks of 4 to 64 the limit laws are far off. The
    triangular factors of the two are drawn directly (Bartlett's decomposition), so that the cost
    does not depend on `shape`.
    """

    shape: tuple[int, int]
    inner: int

    def energy(self, rank: int) -> float:
        return float(self._draws()[:, :rank].square().sum(dim=1).mean())

    def singular_values(self, norm: float, count: int) -> list[float]:
        return (norm * self._draws()[:, :count].mean(dim=0)).tolist()

    def largest(self, mean_square: float) -> float:
        """What the largest singular value exceeds in about one of a thousand random adapters.

        Args:
            mean_square: ‖delta‖_F² / inner.
        """
        first = self._draws()[:, 0] * math.sqrt(self.inner)
        highest = first.mean() + DEVIATIONS * first.std(correction=0)
        return math.sqrt(mean_square) * float(highest)

    def _draws(self) -> Tensor:
        return _adapter_spectra(*self.shape, self.inner)


@lru_cache(maxsize=64)
def _adapter_spectra(out_features: int, in_features: int, inner: int) -> Tensor:
    """Singular values (draws, inner) of random adapters of norm 1, descending."""
    source = random.Random(0)
    left = torch.stack([_triangular(out_features, inner, source) for _ in range(DRAWS)])
    right = torch.stack([_triangular(in_features, inner, source) for _ in range(DRAWS)])
    values = torch.linalg.svdvals(left @ right.mT)
    return values / values.norm(dim=1, keepdim=True)


def _triangular(rows: int, cols: int, source: random.Random) -> Tensor:
    """R of the QR decomposition of a rows x cols Gaussian matrix; `cols` is at most `rows`."""
    generator = torch.Generator().manual_seed(source.getrandbits(63))
    factor = torch.randn(cols, cols, generator=generator, dtype=torch.float64).triu(1)
    chi = [math.sqrt(source.gammavariate((rows - i) / 2, 2)) for i in range(cols)]
    return factor + torch.diag(torch.tensor(chi, dtype=torch.float64))


def random_reference(name: str, layer: HasSpectrum) -> RandomDelta | RandomAdapter:
    """The random delta to compare a layer with, which has the layer's shape and rank.

    Raises:
        ValueError: naming the layer, if a value is not finite.
    """
    values = singular_values(name, layer)
    whole = energy_not_held([value * value for value in values], layer.norm) == 0
    inner = sum(value > ROUNDING * values[0] for value in values)
    out_features, in_features = layer.shape
    if whole and 0 < inner < min(layer.shape):
        return RandomAdapter((out_features, in_features), inner)
    return RandomDelta((out_features, in_features))
