"""The figure of several masks: what each pair shares, beside what chance would give."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..canvas import new_figure, save_figure
from .overlap import Comparison, MaskOverlap

Cell = Callable[[int, int], tuple[float, str] | None]


def plot_mask_overlap(comparison: Comparison, path: str | os.PathLike, *, title: str = "") -> None:
    """Matrices of the pairs: entries and rows of the masks; of deltas cosines and angles.

    In every cell the number, and below it in brackets that of random masks or deltas.

    Raises:
        ImportError: without matplotlib.
    """
    panels = _panels(comparison)
    count = len(comparison.labels)
    side = max(2.6, 0.95 * count)
    columns = 2 if len(panels) > 2 else len(panels)
    figure = new_figure((side + 2.2) * columns, (side + 1.5) * (len(panels) // columns) + 0.5)
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(panels) // columns, columns).flat
    for axes, (heading, note, cell, signed) in zip(grid, panels, strict=True):
        _draw(axes, comparison, heading, note, cell, signed)
    save_figure(figure, path)


def _panels(comparison: Comparison) -> list[tuple[str, str, Cell, bool]]:
    def of_masks(cell: Callable[[MaskOverlap], tuple[float, str]]) -> Cell:
        return lambda i, j: cell(comparison.overlaps[i, j])

    shares_A = all(overlap.shares_A for overlap in comparison.overlaps.values())
    panels: list[tuple[str, str, Cell, bool]] = [
        (
            "entries in both / in either",
            "Jaccard; random masks in brackets"
            if shares_A
            else "Jaccard; means nothing over different A",
            of_masks(lambda o: (o.jaccard, f"{o.jaccard:.4f}\n({o.random_jaccard:.4f})")),
            False,
        ),
        (
            "how full the rows are",
            "correlation of row densities; 0 of random masks",
            of_masks(lambda o: (o.row_correlation, f"{o.row_correlation:+.2f}")),
            True,
        ),
    ]
    if not comparison.interference:
        return panels

    def cosine(i: int, j: int) -> tuple[float, str] | None:
        found = comparison.interference.get((i, j))
        if found is None or found.cosine is None:
            return None
        return found.cosine, f"{found.cosine:+.3f}\n(±{found.random_B_cosine:.4f})"

    def angles(i: int, j: int) -> tuple[float, str] | None:
        found = comparison.interference.get((i, j))
        space = None if found is None else found.outputs
        if space is None:
            return None
        return space.mean_squared, f"{space.mean_squared:.3f}\n({space.random_mean_squared:.3f})"

    return [
        *panels,
        ("cosine of the deltas", "random B over the same A in brackets", cosine, True),
        (
            "shared output directions",
            "mean cos² of the angles; random in brackets",
            angles,
            False,
        ),
    ]


def _draw(
    axes: Any, comparison: Comparison, heading: str, note: str, cell: Cell, signed: bool
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    count = len(comparison.labels)
    colours = colormaps["PuOr_r" if signed else "viridis"]
    scale = Normalize(-1.0 if signed else 0.0, 1.0)
    pixels = [[(0.93, 0.93, 0.93)] * count for _ in range(count)]
    for i, j in comparison.overlaps:
        found = cell(i, j)
        if found is None:
            continue
        value, text = found
        red, green, blue, _ = colours(scale(value))
        # Luminance of Rec. 709 decides between dark and light letters.
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        for row, column in ((i, j), (j, i)):
            pixels[row][column] = (red, green, blue)
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.imshow(pixels, interpolation="none")
    names = [label if len(label) <= 18 else f"…{label[-17:]}" for label in comparison.labels]
    axes.set_xticks(range(count), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set_xticks([i - 0.5 for i in range(1, count)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, count)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{heading}\n{note}", fontsize=9.5)
