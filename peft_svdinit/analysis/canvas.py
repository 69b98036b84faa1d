"""What the figures share: colours, an empty figure, saving; without pyplot's global state."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..files import replacing

# Okabe and Ito's colours, told apart with any colour vision, but for their yellow, too pale on
# white, and their black, too heavy in a filled area.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#454545")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHER = "other"
OTHER_COLOUR = "#B5B5B5"
GUIDE = "#6B6B6B"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; run "
            "pip install 'peft-svdinit[report]', or ask for no plots"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write the figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """As many entries per row as fit into `width` inches, at about 0.09 inch a character."""
    return max(1, min(len(labels), int(width / (0.09 * max(map(len, labels)) + 0.6))))


def tidy(axes: Any) -> None:
    """A light grid behind the data and no box around it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)


def shown_types(types: Iterable[str], most: int = len(COLOURS)) -> list[str]:
    """The commonest types, at most `most`; in the order of first appearance if these are all."""
    counts = Counter(types)
    if len(counts) <= most:
        return list(counts)
    return [kind for kind, _ in counts.most_common(most)]


def styles_of(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each kind; there are seven besides `OTHER`."""
    looks = zip(COLOURS, MARKERS, strict=True)
    return {kind: (OTHER_COLOUR, "*") if kind == OTHER else next(looks) for kind in kinds}
