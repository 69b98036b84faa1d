"""Matrices in colours: the cells, the numbers in them, their names and the colour bar."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..models import layer_depth
from .canvas import plain, shortened
from .markdown import span

NO_DEPTH = "-"
EMPTY = "#E9E9E9"
_MOST_NAMES = 34
MOST_ROWS = 128
"""Of a picture; more would be lines, and a page that nobody can look at."""
_LONGEST_UPRIGHT = 4

T = TypeVar("T")


def by_depth(
    layers: Mapping[str, T], kinds: Mapping[str, str], most: int | None = None
) -> tuple[list[str], list[str], dict[tuple[str, str], list[T]]]:
    """Depths in order, kinds in order of appearance, and the layers of each depth and kind.

    The depth is the first number in a module's name; "-", last, stands for those without one. Of
    more than `most` depths as many neighbours as needed are one row, "8 to 11" say.
    """
    cells: dict[tuple[str, str], list[T]] = defaultdict(list)
    depths = {name: layer_depth(name) for name in layers}
    numbers = sorted({depth for depth in depths.values() if depth is not None})
    together = 1 if most is None else max(1, math.ceil(len(numbers) / most))
    rows: dict[int | None, str] = {}
    for start in range(0, len(numbers), together):
        run = numbers[start : start + together]
        rows |= dict.fromkeys(run, span(run[0], run[-1]))
    if None in depths.values():
        rows[None] = NO_DEPTH
    for name, layer in layers.items():
        cells[rows[depths[name]], kinds[name]].append(layer)
    columns = list(dict.fromkeys(kinds[name] for name in layers))
    return list(dict.fromkeys(rows.values())), columns, dict(cells)


def draw_cells(
    axes: Any,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    scale: Any,
    texts: Sequence[Sequence[str]] | None = None,
) -> Any:
    """Draw a matrix, grey where it has no value; returns what a colour bar needs.

    Args:
        colours: name of a colour map.
        scale: from values to [0, 1].
        texts: written into the cells that have a value.
    """
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=EMPTY, under=EMPTY)
    image = axes.imshow(
        [[math.nan if value is None else value for value in row] for row in values],
        aspect="auto",
        cmap=palette,
        norm=scale,
        interpolation="none",
    )
    name_columns(axes, columns)
    step = math.ceil(len(rows) / _MOST_NAMES)
    axes.set_yticks(range(0, len(rows), step), [plain(shortened(row)) for row in rows[::step]])
    # White lines between the cells.
    axes.set_xticks([i - 0.5 for i in range(1, len(columns))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            value = values[row][column]
            if value is not None:
                red, green, blue, _ = palette(scale(value))
                # Luminance of Rec. 709 decides between dark and light letters.
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
                colour = "white" if dark else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return image


def name_columns(axes: Any, names: Sequence[str], most: int = _MOST_NAMES) -> None:
    """Names under the columns, slanted unless all are short; beyond `most` at even distances."""
    step = math.ceil(len(names) / most)
    shown = [plain(shortened(name)) for name in names[::step]]
    slanted = max(map(len, names)) > _LONGEST_UPRIGHT
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(0, len(names), step), shown, **turned)


def short_number(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"


def colour_bar(figure: Any, image: Any, axes: Any, label: str, **options: Any) -> Any:
    """A colour bar below one or several axes."""
    bar = figure.colorbar(image, ax=axes, location="bottom", pad=0.02, **{"aspect": 24, **options})
    bar.set_label(label, fontsize=10)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    return bar
