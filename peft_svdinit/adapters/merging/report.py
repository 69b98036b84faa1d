"""`merge_report.md`: what was merged, how exactly, and who is in whose way."""

from __future__ import annotations

from pathlib import Path

from ...analysis import markdown_table
from ...factors import PairInterference
from .record import Merged, MergedLayer

_MOST_LAYERS = 20
PAIR_COLUMNS = ("cosine", "by chance", "over these A", "outputs", "inputs", "Jaccard", "by chance")


def merge_report(merged: Merged) -> str:
    """The report as Markdown."""
    paragraphs = [
        "# Merged adapter",
        markdown_table(
            ("adapter", "weight", "delta norm"),
            [
                (f"{index + 1}: `{path}`", f"{weight:g}", f"{norm:.4g}")
                for index, (path, weight, norm) in enumerate(
                    zip(merged.adapters, merged.weights, merged.norms, strict=True)
                )
            ],
        ),
        in_words(merged),
        *_remarks(merged),
        "## Interference",
        markdown_table(
            ("pair", *PAIR_COLUMNS, "largest, outputs", "largest, inputs"),
            [
                (
                    f"{pair.first + 1} and {pair.second + 1}",
                    *pair_cells(pair.interference),
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
            [_row(layer) for layer in worst_layers(merged, _MOST_LAYERS)],
        ),
        f"The {min(_MOST_LAYERS, len(merged.layers))} of {len(merged.layers)} layers with the "
        "largest error; all are in the JSON beside this report.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def in_words(merged: Merged) -> str:
    """Method, ranks, size and error in one sentence."""
    ranks = [layer.rank for layer in merged.layers]
    spread = f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    return (
        f"Method {merged.method.name}: {len(ranks)} layers, rank {spread}; {merged.parameters:,} "
        f"parameters of {merged.parameters_before:,} in {len(merged.adapters)} adapters; relative "
        f"error {shown_error(merged.relative_error)} against the exact weighted sum."
    )


def shown_error(error: float | None) -> str:
    """A relative error; of a zero sum there is none."""
    return "infinite" if error is None else f"{error:.2e}"


def pair_cells(pair: PairInterference) -> tuple[str, ...]:
    """Values of `PAIR_COLUMNS`."""
    spaces = [
        f"{space.mean_squared:.2g} ({space.random_mean_squared:.2g})" if space else "-"
        for space in (pair.outputs, pair.inputs)
    ]
    support = pair.support
    return (
        "-" if pair.cosine is None else f"{pair.cosine:+.2g}",
        f"{pair.random_cosine:.2g}",
        f"{pair.random_B_cosine:.2g}",
        *spaces,
        f"{support.jaccard:.1%}" if support else "-",
        f"{support.random_jaccard:.1%}" if support else "-",
    )


def worst_layers(merged: Merged, most: int) -> list[MergedLayer]:
    """Those of the largest relative error, first."""
    infinite = float("inf")

    def error(layer: MergedLayer) -> float:
        return infinite if layer.relative_error is None else layer.relative_error

    return sorted(merged.layers, key=error, reverse=True)[:most]


def _remarks(merged: Merged) -> list[str]:
    remarks = []
    if merged.left_out:
        names = ", ".join(f"`{Path(path).name}`" for path in merged.left_out)
        remarks.append(f"Left out, for their weight is 0: {names}.")
    if merged.shares_A and merged.method.name != "shared":
        remarks.append(
            "The adapters share A in every layer: method `shared` gives the exact sum at the rank "
            "of one adapter."
        )
    if merged.only_in_some:
        remarks.append(f"{len(merged.only_in_some)} layers are in some of the adapters only.")
    return remarks


def _row(layer: MergedLayer) -> tuple[str, ...]:
    cosines = [pair.cosine for pair in layer.pairs.values() if pair.cosine is not None]
    return (
        f"`{layer.name}`",
        " + ".join(str(rank) for rank in layer.ranks.values()),
        str(layer.rank),
        f"{layer.norm:.4g}",
        shown_error(layer.relative_error),
        f"{max(cosines, key=abs):+.2g}" if cosines else "-",
    )
