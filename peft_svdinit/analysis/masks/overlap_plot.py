"""The figure of several masks: what each pair shares, beside what chance would give."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..canvas import new_figure, panels, save_figure, shortened
from ..cells import draw_cells
from .overlap import Comparison

_LONGEST_LABEL = 18


class _Matrix(NamedTuple):
    """A number of each pair, and what is written into its cell; `signed` ones begin at -1."""

    heading: str
    note: str
    cell: Callable[[tuple[int, int]], tuple[float, str] | None]
    signed: bool


def plot_mask_overlap(comparison: Comparison, path: str | os.PathLike, *, title: str = "") -> None:
    """Matrices of the pairs: entries and rows of the masks; of deltas cosines and angles.

    In every cell the number, and below it in brackets that of random masks or deltas.

    Raises:
        ImportError: without matplotlib.
    """
    matrices = _matrices(comparison)
    side = max(2.6, 0.95 * len(comparison.labels))
    figure = new_figure((side + 2.2) * 2, (side + 1.5) * (len(matrices) // 2) + 0.5, title)
    for axes, matrix in zip(panels(figure, len(matrices), 2), matrices, strict=True):
        _draw(axes, comparison, matrix)
    save_figure(figure, path)


def _matrices(comparison: Comparison) -> list[_Matrix]:
    def jaccard(pair: tuple[int, int]) -> tuple[float, str]:
        overlap = comparison.overlaps[pair]
        return overlap.jaccard, f"{overlap.jaccard:.4f}\n({overlap.random_jaccard:.4f})"

    def rows(pair: tuple[int, int]) -> tuple[float, str]:
        correlation = comparison.overlaps[pair].row_correlation
        return correlation, f"{correlation:+.2f}"

    def cosine(pair: tuple[int, int]) -> tuple[float, str] | None:
        found = comparison.interference.get(pair)
        if found is None or found.cosine is None:
            return None
        return found.cosine, f"{found.cosine:+.3f}\n(±{found.random_B_cosine:.4f})"

    def angles(pair: tuple[int, int]) -> tuple[float, str] | None:
        found = comparison.interference.get(pair)
        space = None if found is None else found.outputs
        if space is None:
            return None
        return space.mean_squared, f"{space.mean_squared:.3f}\n({space.random_mean_squared:.3f})"

    shares_A = all(overlap.shares_A for overlap in comparison.overlaps.values())
    chance = "random masks in brackets" if shares_A else "means nothing over different A"
    of_masks = [
        _Matrix("entries in both / in either", f"Jaccard; {chance}", jaccard, False),
        _Matrix(
            "how full the rows are", "correlation of row densities; 0 of random masks", rows, True
        ),
    ]
    of_deltas = [
        _Matrix("cosine of the deltas", "random B over the same A in brackets", cosine, True),
        _Matrix(
            "shared output directions", "mean cos² of the angles; random in brackets", angles, False
        ),
    ]
    return [*of_masks, *(of_deltas if comparison.interference else ())]


def _draw(axes: Any, comparison: Comparison, matrix: _Matrix) -> None:
    from matplotlib.colors import Normalize

    count = len(comparison.labels)
    values: list[list[float | None]] = [[None] * count for _ in range(count)]
    texts = [[""] * count for _ in range(count)]
    for i, j in comparison.overlaps:
        found = matrix.cell((i, j))
        if found is not None:
            values[i][j] = values[j][i] = found[0]
            texts[i][j] = texts[j][i] = found[1]
    names = [shortened(label, _LONGEST_LABEL) for label in comparison.labels]
    scale = Normalize(-1.0 if matrix.signed else 0.0, 1.0)
    draw_cells(axes, values, names, names, "PuOr_r" if matrix.signed else "viridis", scale, texts)
    axes.set_aspect("equal")
    axes.set_title(f"{matrix.heading}\n{matrix.note}", fontsize=9.5)
