"""What the plots of a comparison have in common: how a method looks, and its name."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...files import one_line
from ..canvas import COLOURS, MARKERS, plain
from .compare import Comparison

DASHES = ("-", "--", "-.", ":")
LONGEST_LABEL = 40
# Without the last, which vanishes on a dark page.
PALETTE = COLOURS[:-1]
LOSS = "evaluation loss (nats per token)"


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure; `color` is None for the text's own colour."""

    color: str | None
    marker: str
    dash: str


@dataclass(frozen=True)
class Panel:
    """One plot: `draw(axes, ink)` fills any axes, `height` is in inches, at about 4 to 7 wide."""

    name: str
    title: str
    remarks: tuple[str, ...]
    draw: Callable[[Any, str], None]
    height: float = 3.4
    grid: Literal["both", "x"] = "both"


def method_styles(comparison: Comparison) -> dict[str, Style]:
    """A style for every method: the references in the text's colour, the others coloured."""
    styles = {
        comparison.reference: Style(None, "o", "-"),
        comparison.total_reference: Style(None, "s", "--"),
    }
    names = [method.method for method in comparison.methods]
    names += [sweep.method for sweep in comparison.sweeps if sweep.method not in names]
    others = [name for name in names if name not in styles]
    for position, name in enumerate(others):
        lap, color = divmod(position, len(PALETTE))
        styles[name] = Style(
            PALETTE[color],
            MARKERS[(position + 2) % len(MARKERS)],
            DASHES[lap % len(DASHES)],
        )
    return {name: styles[name] for name in names}


def method_labels(comparison: Comparison) -> dict[str, str]:
    """Labels for a legend, those with a sunk teacher marked."""
    labels = {sweep.method: sweep.label for sweep in comparison.sweeps}
    for method in comparison.methods:
        sunk = " (teacher sunk)" if method.teacher_sunk else ""
        labels[method.method] = f"{method.label}{sunk}"
    return labels


def short_label(label: str, width: int = LONGEST_LABEL, lines: int = 1) -> str:
    """A label for matplotlib, cut to `lines` of `width`."""
    wrapped = textwrap.wrap(one_line(label), width, max_lines=lines, placeholder="\u2026")
    return plain("\n".join(wrapped))


def compact(value: float, _position: int | None = None) -> str:
    """A count for an axis: 1500 is 1.5k, 2000000 is 2M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
