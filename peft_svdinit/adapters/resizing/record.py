"""What resizing did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...factors import RankRule
from ..record import CombinedAdapter, KeptLayer


@dataclass(frozen=True)
class Resized(CombinedAdapter[KeptLayer]):
    """A resized adapter and its errors; layers whose delta is zero stay, with zeros.

    Attributes:
        rule: what was asked for.
    """

    rule: RankRule

    def remarks(self) -> list[str]:
        zero = f"{len(self.zero_layers)} layers have a zero delta and keep zeros."
        return [*super().remarks(), *([zero] if self.zero_layers else [])]

    def as_dict(self) -> dict[str, Any]:
        found = super().as_dict()
        found["totals"]["energy"] = self.energy
        return found | {"target": asdict(self.rule), "zero_layers": self.zero_layers}
