"""The interference of two of the merged adapters, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...factors import PairInterference

COLUMNS = ("cosine", "by chance", "over these A", "outputs", "inputs", "Jaccard", "by chance")
_WIDTHS = (8, 9, 12, 15, 15, 8, 9)


@dataclass(frozen=True)
class Pair:
    """Two of the merged adapters, by their index."""

    first: int
    second: int
    interference: PairInterference

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"adapters": [self.first, self.second]} | self.interference.as_dict()

    def cells(self) -> tuple[str, ...]:
        """Values of `COLUMNS`."""
        found = self.interference
        spaces = [
            f"{space.mean_squared:.2g} ({space.random_mean_squared:.2g})" if space else "-"
            for space in (found.outputs, found.inputs)
        ]
        support = found.support
        return (
            "-" if found.cosine is None else f"{found.cosine:+.2g}",
            f"{found.random_cosine:.2g}",
            f"{found.random_B_cosine:.2g}",
            *spaces,
            f"{support.jaccard:.1%}" if support else "-",
            f"{support.random_jaccard:.1%}" if support else "-",
        )


def pair_lines(pairs: tuple[Pair, ...]) -> list[str]:
    """A table of plain text."""
    rows = [("pair", COLUMNS)]
    rows += [(f"{pair.first + 1}, {pair.second + 1}", pair.cells()) for pair in pairs]
    return [
        " ".join(
            [f"{title:<6}", *(f"{c:>{width}}" for c, width in zip(cells, _WIDTHS, strict=True))]
        )
        for title, cells in rows
        if pairs
    ]
