"""What all figures share: colours, axes, legends and files, without pyplot's global state."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..files import one_line, printable, replacing

# Okabe and Ito's colours, told apart with any colour vision, but for their yellow, too pale on
# white, and their black, too heavy in a filled area.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#454545")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHER = "other"
OTHER_COLOUR = "#B5B5B5"
INK = "#1C1F24"
# Legible on white and on a dark page.
GUIDE = "#757B85"
# Letters of a name.
LONGEST_NAME = 44
# Replaced by `currentColor` in the page's SVG; no other colour may have this value.
PAGE_INK = "#010203"


def check_matplotlib() -> None:
    """Raise ImportError, naming the extra, if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; run "
            "pip install 'peft-svdinit[report]', or ask for none with plots=False, plot=False"
        ) from error


def new_figure(width: float, height: float, title: str = "") -> Any:
    """An empty figure of this size in inches.

    Raises:
        ImportError: without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(plain(title), fontsize=13)
    return figure


def panels(figure: Any, count: int, columns: int, **shared: bool) -> list[Any]:
    """The axes of `count` plots, row by row; places left over in the last row stay empty."""
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **shared)
    places = [axes for line in grid for axes in line]
    for axes in places[count:]:
        axes.set_axis_off()
    return places[:count]


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write the figure as PNG, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(png_of(figure))


def png_of(figure: Any) -> bytes:
    return _saved(figure, "png", dpi=150)


def svg_of(figure: Any, name: str) -> str:
    """The figure as an SVG element without any address in it, `PAGE_INK` as the page's colour.

    Args:
        name: tells its inner names from those of other figures of a page.
    """
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = _saved(figure, "svg", metadata={"Date": None}, transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # An SVG element inside HTML needs no namespaces, and the page promises not to hold addresses.
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=").replace(PAGE_INK, "currentColor")
    # The outermost element loses its size, so that the page's CSS gives it one.
    end = text.index(">")
    return re.sub(r'\s(width|height)="[^"]*"', "", text[:end]) + text[end:]


def _saved(figure: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A box stands for a letter of a name that the font does not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def plain(text: str) -> str:
    """`text` as matplotlib shows it letter by letter: no formulas, and in a legend whatever it is.

    Legends leave out what begins with an underscore.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def shortened(name: Any, longest: int = LONGEST_NAME) -> str:
    """A name on one line, of a longer one its end, which tells layers and files apart."""
    line = one_line(name)
    return line if len(line) <= longest else f"…{line[1 - longest :]}"


def tidy(axes: Any, ink: str = INK, *, grid: str = "both") -> None:
    """A light grid behind the data, no box around it, and all text in `ink`."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GUIDE)
    axes.grid(False)
    axes.grid(axis=grid, color=GUIDE, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=GUIDE, labelcolor=ink)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)


def legend_outside(
    figure: Any,
    handles: Sequence[Any],
    labels: Sequence[str],
    title: str | None = None,
    *,
    at: Literal["upper", "lower"] = "lower",
) -> Any:
    """A legend above or under everything, for which the figure grows by its height."""
    # At 9 points a character takes about 0.07 inch, a line 0.2.
    width = 0.07 * max(map(len, labels)) + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / width)))
    lines = math.ceil(len(labels) / columns) + (title is not None)
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    return figure.legend(
        handles,
        labels,
        loc=f"outside {at} center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=title,
    )


def say(axes: Any, text: str) -> None:
    """A word in place of data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GUIDE)


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


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
