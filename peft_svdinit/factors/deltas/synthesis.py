"""A teacher of higher rank synthesised from a LoRA, for when a full fine-tune does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...linalg import random_complement
from ...models import layer_seed
from ..low_rank import LowRankFactors


@dataclass(frozen=True)
class Synthesis:
    """Extend the factors of a LoRA's delta to a higher rank.

    The given singular triplets are kept as they are. Appended are singular values that decay as
    σ_r exp(−tail_decay j), with random orthonormal vectors orthogonal to the kept ones, and
    Gaussian noise within the appended subspace. The appended part is scaled so that its largest
    singular value is σ_r exp(−tail_decay): the kept triplets stay the leading ones.

    What comes out is not a full fine-tune: all that was learned is in the kept triplets.

    Attributes:
        rank: triplets of the result, capped by each layer's smaller side.
        tail_decay: decay per appended singular value, > 0.
        noise_share: share of the appended energy that is noise, in [0, 1); a single appended
            triplet has no room for noise.
        seed: of all randomness; a layer's draw depends on the seed and its name only.
    """

    rank: int = 64
    tail_decay: float = 0.1
    noise_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.tail_decay < math.inf:
            raise ValueError(f"tail_decay must be positive and finite, got {self.tail_decay}")
        if not 0 <= self.noise_share < 1:
            raise ValueError(f"noise_share must be in [0, 1), got {self.noise_share}")

    def __call__(self, name: str, factors: LowRankFactors) -> LowRankFactors:
        """The synthesised factors of the layer `name`; their norm counts the appended part.

        Raises:
            ValueError: if `rank` is below the number of triplets given.
        """
        if self.rank < factors.rank:
            raise ValueError(
                f"rank must be at least the adapter's, {factors.rank} in layer {name}, got "
                f"{self.rank}"
            )
        appended = min(self.rank, *factors.shape) - factors.rank
        if not appended:
            return factors
        generator = torch.Generator().manual_seed(layer_seed(self.seed, name))
        left = random_complement(factors.U, appended, generator)
        right = random_complement(factors.Vh.mT, appended, generator)
        core_U, core_S, core_Vh = torch.linalg.svd(self._core(appended, generator))
        # The smallest singular value that is more than the rounding of the largest.
        meaningful = factors.S[factors.S > factors.rank * 1e-6 * factors.S[0]]
        smallest = meaningful[-1].double().item() if len(meaningful) else 0.0
        tail = core_S * (smallest * math.exp(-self.tail_decay) / core_S[0])
        dtype = factors.U.dtype
        # Kept singular values that are mere rounding sort behind the appended ones.
        S, order = torch.cat([factors.S, tail.to(dtype)]).sort(descending=True, stable=True)
        return LowRankFactors(
            U=torch.cat([factors.U, left @ core_U.to(dtype)], dim=1)[:, order],
            S=S,
            Vh=torch.cat([factors.Vh, core_Vh.to(dtype) @ right.mT])[order],
            norm=math.sqrt(factors.norm**2 + tail.square().sum().item()),
        )

    def _core(self, size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
        """Decaying diagonal plus noise off the diagonal, so that their energies add exactly."""
        decay = torch.exp(-self.tail_decay * torch.arange(size, dtype=torch.float64))
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        noise.fill_diagonal_(0)
        if size > 1:
            ratio = self.noise_share / (1 - self.noise_share)
            noise *= math.sqrt(ratio) * decay.norm() / noise.norm()
        return torch.diag(decay) + noise
