"""A document as one HTML file that needs nothing but itself."""

from __future__ import annotations

from importlib import resources

from ...files import printable
from .compare import Comparison
from .document import Document
from .figures import draw_svg
from .panels import method_labels, method_styles

# The marks of `panels.MARKERS`, as paths in a box from -5 to 5.
MARKER_PATHS = {
    "o": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "s": "M-3-3h6v6h-6z",
    "^": "M0-4L4 3.2H-4z",
    "D": "M0-4.2L4.2 0L0 4.2L-4.2 0z",
    "v": "M0 4L4-3.2H-4z",
    "P": "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "X": "M-4-2.2L-2.2-4L0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
}
DASH_ARRAYS = {"-": "none", "--": "6 3", "-.": "7 3 2 3", ":": "2 3"}


def html_page(document: Document, comparison: Comparison) -> str:
    """The whole page: every text is escaped, every figure is inline SVG, nothing is fetched.

    Raises:
        ImportError: if jinja2 or matplotlib is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            "the page needs jinja2; install it with `pip install peft-svdinit[report]`"
        ) from error
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("peft_svdinit.analysis.runs").joinpath("page.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    labels = method_labels(comparison)
    legend = [
        {
            "label": labels[name],
            "color": style.color or "currentColor",
            "marker": MARKER_PATHS[style.marker],
            "dash": DASH_ARRAYS[style.dash],
        }
        for name, style in method_styles(comparison).items()
    ]
    return template.render(
        document=document, legend=legend, svg=lambda panel: Markup(draw_svg(panel))
    )
