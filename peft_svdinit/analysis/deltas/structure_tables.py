"""Tables of what is structure in the deltas: other ranks, spikes, intruders."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..markdown import code, columns_table
from .groups import spike_count
from .intruders import LayerIntruders, intruder_total
from .layers import LayerAnalysis
from .rank_table import RankRow
from .totals import Analysis

MOST_LAYERS = 12
MOST_VALUES = 5

Group = tuple[str, list[LayerAnalysis]]


def ranks_table(rows: Sequence[RankRow]) -> str:
    """What one common rank keeps and costs."""
    table = columns_table(
        rows,
        {
            "rank": lambda row: row.rank,
            "energy kept": lambda row: f"{row.energy:.2%}",
            "relative error": lambda row: f"{row.error:.2%}",
            "parameters": lambda row: f"{row.parameters:,}",
            "size in bf16": lambda row: _size(row.bytes),
        },
    )
    return (
        f"{table}\n\nOne rank for all layers; a layer that holds fewer triplets keeps those it "
        "holds."
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

    def median(group: Group, value: Callable[[LayerAnalysis], float]) -> float:
        return statistics.median(map(value, group[1]))

    table = columns_table(
        analysis.by_type(analysis.changed).items(),
        {
            "module": lambda group: group[0],
            "layers": lambda group: len(group[1]),
            f"energy at rank {analysis.rank}": lambda group: (
                f"{median(group, lambda layer: layer.energy_ratio):.1%}"
            ),
            "of a random delta": lambda group: (
                f"{median(group, lambda layer: layer.random_energy):.1%}"
            ),
            "ratio": lambda group: f"{median(group, lambda layer: layer.concentration):.2g}",
            "spikes": lambda group: spike_count(group[1]),
            "energy in spikes": lambda group: (
                f"{median(group, lambda layer: layer.spikes.energy):.1%}"
            ),
        },
    )
    return (
        f"{table}\n\nMedians over the layers. A spike is a singular value that the layer's random "
        "part, which is what the spikes leave, would exceed once in a thousand times; `≥`: all "
        "held triplets are spikes. Random deltas have independent entries and the layer's shape "
        "and norm (arXiv:1103.2221); where the held triplets are the whole delta, as in a LoRA, "
        "they are products of two Gaussian matrices of the layer's rank."
    )


def spiked_layers_table(analysis: Analysis) -> str:
    """The layers whose spikes carry the most."""
    spiked = [layer for layer in analysis.changed if layer.spikes.count]
    if not spiked:
        return "No singular value stands out in any layer." if analysis.changed else ""
    spiked.sort(key=lambda layer: -layer.spikes.energy)
    return columns_table(
        spiked[:MOST_LAYERS],
        {
            f"layer, of {len(spiked)} with spikes": lambda layer: code(layer.name),
            "spikes": lambda layer: spike_count([layer]),
            "energy in them": lambda layer: f"{layer.spikes.energy:.1%}",
            "their singular values": lambda layer: (
                ", ".join(f"{value:.3g}" for value in layer.spikes.values[:MOST_VALUES])
                + (", …" if layer.spikes.count > MOST_VALUES else "")
            ),
            "random edge": lambda layer: f"{layer.spikes.edge:.3g}",
        },
    )


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
    table = columns_table(
        found[:MOST_LAYERS],
        {
            "layer": lambda layer: code(layer.name),
            "intruders": lambda layer: len(layer.indices),
            "their places in the tuned spectrum": lambda layer: ", ".join(map(str, layer.indices)),
            "smallest cosine": lambda layer: f"{min(layer.cosines):.3f}",
        },
    )
    return f"{text}\n\n{table}"
