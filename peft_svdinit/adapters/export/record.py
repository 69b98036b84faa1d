"""What an exported adapter keeps of the factors."""

from __future__ import annotations

from dataclasses import dataclass

from ..record import KeptLayer, WrittenAdapter


@dataclass(frozen=True)
class ExportedAdapter(WrittenAdapter[KeptLayer]):
    """A written adapter, and layer by layer what it keeps.

    Attributes:
        rank: `r` of its configuration; layers of another rank are in `rank_pattern`.
        omitted: the modules that the adapter leaves alone.
    """

    rank: int
    omitted: tuple[str, ...]

    def remarks(self) -> list[str]:
        left = f"Left out: {len(self.omitted)} layers whose delta is zero, or of rank 0."
        return [*super().remarks(), *([left] if self.omitted else [])]
