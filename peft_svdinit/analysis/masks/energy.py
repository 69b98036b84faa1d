"""What of ‖B‖² a mask holds, and what it would hold if it were chosen in other ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from .chance import energy_of_noise


@dataclass(frozen=True)
class Energy:
    """Share of ‖B‖², of which a calibrated B is the measure, in entries chosen in several ways.

    Attributes:
        total: ‖B‖².
        random: in a random mask: its density.
        noise: in the largest entries, as many as the mask has, if B were Gaussian noise.
        by_layer: in random entries of every layer, as many as the mask keeps there.
        by_row: in random entries of every row, as many as the mask keeps there.
        kept: in the mask.
    """

    total: float
    random: float
    noise: float
    by_layer: float
    by_row: float
    kept: float

    @classmethod
    def of(cls, mask: Bool[Tensor, "out rank"], lora_B: Float[Tensor, "out rank"]) -> Energy | None:
        """Of one layer; None if B is zero."""
        squares = lora_B.detach().cpu().double().square()
        kept = mask.cpu().double()
        # Row by row, and rows in their order: one sum over all would depend on the threads.
        rows = squares.sum(1)
        total = math.fsum(rows.tolist())
        if not total:
            return None
        density = float(kept.mean())
        return cls(
            total=total,
            random=density,
            noise=energy_of_noise(density),
            by_layer=density,
            by_row=math.fsum((rows * kept.mean(1)).tolist()) / total,
            kept=math.fsum((squares * kept).sum(1).tolist()) / total,
        )

    @classmethod
    def pooled(cls, energies: Sequence[Energy], density: float) -> Energy | None:
        """Of several layers whose masks together have this density; None if there are none."""
        total = math.fsum(energy.total for energy in energies)
        if not total:
            return None

        def together(share: Callable[[Energy], float]) -> float:
            return math.fsum(energy.total * share(energy) for energy in energies) / total

        return cls(
            total=total,
            random=density,
            noise=energy_of_noise(density),
            by_layer=together(lambda energy: energy.by_layer),
            by_row=together(lambda energy: energy.by_row),
            kept=together(lambda energy: energy.kept),
        )
