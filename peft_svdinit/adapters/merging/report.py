"""`merge_report.md`: what was merged, how exactly, and who is in whose way."""

from __future__ import annotations

from ...analysis import Markdown, code, escaped, markdown_table
from .pairs import COLUMNS
from .record import Merged, MergedLayer

_MOST_LAYERS = 20


def merge_report(merged: Merged) -> str:
    """The report as Markdown."""
    paragraphs = [
        "# Merged adapter",
        markdown_table(
            ("adapter", "weight", "delta norm"),
            [
                (Markdown(f"{index + 1}: {code(path)}"), f"{weight:g}", f"{norm:.4g}")
                for index, (path, weight, norm) in enumerate(
                    zip(merged.adapters, merged.weights, merged.norms, strict=True)
                )
            ],
        ),
        *map(escaped, (merged.in_words(), *merged.remarks())),
        "## Interference",
        markdown_table(
            ("pair", *COLUMNS, "largest, outputs", "largest, inputs"),
            [
                (
                    f"{pair.first + 1} and {pair.second + 1}",
                    *pair.cells(),
                    *(
                        f"{space.largest:.3f}" if space else "-"
                        for space in (pair.interference.outputs, pair.interference.inputs)
                    ),
                )
                for pair in merged.pairs
            ],
        ),
        "Cosine of the two deltas as vectors; what two random deltas would have (root mean "
        "square), and two random B over the A that the adapters have. Outputs and inputs: mean "
        "squared cosine of the principal angles between the column and the row spaces of a layer, "
        "in brackets that of random spaces. Jaccard: nonzero entries of B that both have over "
        "those that either has, where A is the same, then that of entries placed at random. "
        "Largest: cosine of the smallest principal angle in any layer.",
        "## Layers",
        markdown_table(
            ("layer", "ranks", "rank", "norm of the sum", "error", "largest cosine"),
            [_row(layer) for layer in merged.worst(_MOST_LAYERS)],
        ),
        f"The {min(_MOST_LAYERS, len(merged.layers))} of {len(merged.layers)} layers with the "
        "largest error; all are in the JSON beside this report.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _row(layer: MergedLayer) -> tuple[str, ...]:
    cosines = [pair.cosine for pair in layer.pairs.values() if pair.cosine is not None]
    return (
        code(layer.name),
        " + ".join(str(rank) for rank in layer.ranks.values()),
        str(layer.rank),
        f"{layer.norm:.4g}",
        f"{layer.relative_error:.2e}",
        f"{max(cosines, key=abs):+.2g}" if cosines else "-",
    )
