"""Tables of what is structure in the deltas: other ranks, spikes, intruders."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..markdown import markdown_table
from .groups import spike_count
from .intruders import LayerIntruders, intruder_total
from .rank_table import RankRow
from .totals import Analysis

MOST_LAYERS = 12
MOST_VALUES = 5


def ranks_table(rows: Sequence[RankRow]) -> str:
    """What one common rank keeps and costs."""
    header = ("rank", "energy kept", "relative error", "parameters", "size in bf16")
    cells = [
        (
            row.rank,
            f"{row.energy:.2%}",
            f"{row.error:.2%}",
            f"{row.parameters:,}",
            _size(row.bytes),
        )
        for row in rows
    ]
    return (
        f"{markdown_table(header, cells)}\n\nOne rank for all layers; a layer that holds fewer "
        "triplets keeps those it holds."
    )


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def spikes_table(analysis: Analysis) -> str:
    """The spectra against random deltas, by module type."""
    if not analysis.changed:
        return "No layer changed."
    header = (
        "module",
        "layers",
        f"energy at rank {analysis.rank}",
        "of a random delta",
        "ratio",
        "spikes",
        "energy in spikes",
    )
    rows = [
        (
            kind,
            len(layers),
            f"{statistics.median(layer.energy_ratio for layer in layers):.1%}",
            f"{statistics.median(layer.random_energy for layer in layers):.1%}",
            f"{statistics.median(layer.concentration for layer in layers):.2g}",
            spike_count(layers),
            f"{statistics.median(layer.spikes.energy for layer in layers):.1%}",
        )
        for kind, layers in analysis.by_type(analysis.changed).items()
    ]
    return (
        f"{markdown_table(header, rows)}\n\nMedians over the layers. A spike is a singular value "
        "that the layer's random part, which is what the spikes leave, would exceed once in a "
        "thousand times; `≥`: all held triplets are spikes. Random deltas have independent entries "
        "and the layer's shape and norm (arXiv:1103.2221); where the held triplets are the whole "
        "delta, as in a LoRA, they are products of two Gaussian matrices of the layer's rank."
    )


def spiked_layers_table(analysis: Analysis) -> str:
    """The layers whose spikes carry the most."""
    spiked = [layer for layer in analysis.changed if layer.spikes.count]
    if not spiked:
        return "No singular value stands out in any layer." if analysis.changed else ""
    spiked.sort(key=lambda layer: -layer.spikes.energy)
    rows = [
        (
            f"`{layer.name}`",
            spike_count([layer]),
            f"{layer.spikes.energy:.1%}",
            ", ".join(f"{value:.3g}" for value in layer.spikes.values[:MOST_VALUES])
            + (", …" if layer.spikes.count > MOST_VALUES else ""),
            f"{layer.spikes.edge:.3g}",
        )
        for layer in spiked[:MOST_LAYERS]
    ]
    header = (
        f"layer, of {len(spiked)} with spikes",
        "spikes",
        "energy in them",
        "their singular values",
        "random edge",
    )
    return markdown_table(header, rows)


def intruder_table(layers: Sequence[LayerIntruders]) -> str:
    """Directions of the tuned weights that the base weights do not have."""
    looked_at = sum(len(layer.cosines) for layer in layers)
    found = sorted(
        (layer for layer in layers if layer.indices), key=lambda layer: -len(layer.indices)
    )
    text = (
        f"**{intruder_total(layers)}** of the {looked_at} leading left singular vectors of the "
        f"tuned weights have a |cosine| below {layers[0].threshold:g} with every one of the base "
        f"weight, in {len(found)} of {len(layers)} layers (arXiv:2410.21228: known of LoRA, hardly "
        "of full fine-tuning, and connected with forgetting)."
    )
    if not found:
        return text
    rows = [
        (
            f"`{layer.name}`",
            len(layer.indices),
            ", ".join(map(str, layer.indices)),
            f"{min(layer.cosines):.3f}",
        )
        for layer in found[:MOST_LAYERS]
    ]
    header = ("layer", "intruders", "their places in the tuned spectrum", "smallest cosine")
    return f"{text}\n\n{markdown_table(header, rows)}"
