"""Chapters of the report on what is structure in the deltas: other ranks, spikes, intruders."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from ..markdown import markdown_table
from .intruders import LayerIntruders, intruder_total
from .layers import Analysis, LayerAnalysis
from .rank_table import RankRow

MOST_LAYERS = 12
MOST_VALUES = 5


def rank_chapter(rows: Sequence[RankRow]) -> list[str]:
    """What one common rank keeps and costs."""
    return [
        markdown_table(
            ("rank", "energy kept", "relative error", "parameters", "size in bf16"),
            (
                (
                    row.rank,
                    f"{row.energy:.2%}",
                    f"{row.error:.2%}",
                    f"{row.parameters:,}",
                    _size(row.bytes),
                )
                for row in rows
            ),
        ),
        "One rank for all layers; a layer that holds fewer triplets keeps those it holds. The "
        "error is that of the best approximation of this rank, before any rounding.",
    ]


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def spikes_chapter(analysis: Analysis) -> list[str]:
    """The spectra against random deltas, and the singular values that stand out."""
    if not analysis.changed:
        return ["No layer changed."]
    groups: dict[str, list[LayerAnalysis]] = defaultdict(list)
    for layer in analysis.changed:
        groups[analysis.module_types[layer.name]].append(layer)
    partial = any(not layer.spikes.complete for layer in analysis.changed)
    header = (
        "module",
        "layers",
        f"energy at rank {analysis.rank}",
        "of a random delta",
        "ratio",
        "spikes",
        "energy in spikes",
    )
    by_type = (
        (
            kind,
            len(layers),
            f"{statistics.median(layer.energy_ratio for layer in layers):.1%}",
            f"{statistics.median(layer.random_energy for layer in layers):.1%}",
            f"{statistics.median(layer.concentration for layer in layers):.2g}",
            _counts(layers),
            f"{statistics.median(layer.spikes.energy for layer in layers):.1%}",
        )
        for kind, layers in groups.items()
    )
    paragraphs = [
        markdown_table(header, by_type),
        _how_to_read(analysis),
    ]
    if partial:
        paragraphs.append(
            "`≥`: in these layers every held triplet stands out, so the true count is higher; an "
            "extraction at a higher rank would find it."
        )
    ranked = sorted(analysis.changed, key=lambda layer: -layer.spikes.energy)
    spiked = [layer for layer in ranked if layer.spikes.count]
    if not spiked:
        return [*paragraphs, "No singular value stands out in any layer."]
    rows = (
        (
            f"`{layer.name}`",
            _count(layer),
            f"{layer.spikes.energy:.1%}",
            ", ".join(f"{value:.3g}" for value in layer.spikes.values[:MOST_VALUES])
            + (", …" if layer.spikes.count > MOST_VALUES else ""),
            f"{layer.spikes.edge:.3g}",
        )
        for layer in spiked[:MOST_LAYERS]
    )
    return [
        *paragraphs,
        markdown_table(
            ("layer", "spikes", "energy in them", "their singular values", "random edge"), rows
        ),
        f"The layers whose spikes carry the most, of {len(spiked)} with any; all are in the JSON.",
    ]


def _how_to_read(analysis: Analysis) -> str:
    kinds = {layer.spikes.reference for layer in analysis.changed}
    parts = [
        "Medians over the layers. A spike is a singular value that the layer's random part would "
        "exceed once in a thousand times; the random part is what is left without the spikes."
    ]
    if "delta" in kinds:
        parts.append(
            "Random deltas have independent entries and the layer's shape and norm "
            "(Marchenko-Pastur; arXiv:1103.2221)."
        )
    if "adapter" in kinds:
        parts.append(
            "Where the held triplets are the whole delta, as in a LoRA, the random deltas are "
            "products of two Gaussian matrices of the layer's rank."
        )
    return " ".join(parts)


def _counts(layers: Sequence[LayerAnalysis]) -> str:
    counts = [layer.spikes.count for layer in layers]
    mark = "" if all(layer.spikes.complete for layer in layers) else "≥ "
    if min(counts) == max(counts):
        return f"{mark}{counts[0]}"
    return f"{mark}{statistics.median(counts):g} ({min(counts)} to {max(counts)})"


def _count(layer: LayerAnalysis) -> str:
    return f"{'' if layer.spikes.complete else '≥ '}{layer.spikes.count}"


def intruder_chapter(layers: Sequence[LayerIntruders]) -> list[str]:
    """Directions of the tuned weights that the base weights do not have."""
    looked_at = sum(len(layer.cosines) for layer in layers)
    found = sorted(
        (layer for layer in layers if layer.indices), key=lambda layer: -len(layer.indices)
    )
    threshold = layers[0].threshold
    text = (
        f"**{intruder_total(layers)}** of the {looked_at} leading left singular vectors of the "
        f"tuned weights have a |cosine| below {threshold:g} with every singular vector of the "
        f"base weight, in {len(found)} of {len(layers)} layers (arXiv:2410.21228, which finds "
        "them in LoRA, hardly in full fine-tuning, and connects them with forgetting)."
    )
    if not found:
        return [text]
    rows = (
        (
            f"`{layer.name}`",
            len(layer.indices),
            ", ".join(str(index) for index in layer.indices),
            f"{min(layer.cosines):.3f}",
        )
        for layer in found[:MOST_LAYERS]
    )
    header = ("layer", "intruders", "their places in the tuned spectrum", "smallest cosine")
    return [text, markdown_table(header, rows)]
