"""Tables of what a truncation keeps and loses: by module type, and of the worst layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..markdown import Markdown, code, columns_table, markdown_table
from .layers import ENERGY_SHARES, LayerAnalysis
from .totals import Analysis

WORST_LAYERS = 10


def types_table(analysis: Analysis) -> str:
    """One row for each module type, those without a change included."""
    header = (
        "module",
        "layers",
        "out x in",
        "share of Σ‖Δ‖²",
        *(["‖Δ‖ / ‖W‖"] if analysis.knows_base else []),
        "energy kept",
        "median error",
        "worst error",
        "stable rank",
        *(f"rank for {share:.0%}" for share in ENERGY_SHARES),
    )
    groups = analysis.by_type(analysis.layers)
    rows = [_type_row(analysis, kind, layers) for kind, layers in groups.items()]
    return (
        f"{markdown_table(header, rows)}\n\nStable rank and the ranks for a share of the energy "
        "are medians over the layers; `> n`: the n held triplets do not reach it."
    )


def _type_row(analysis: Analysis, kind: str, layers: Sequence[LayerAnalysis]) -> list[str]:
    total = analysis.norm**2
    shapes = {layer.shape for layer in layers}
    errors = [layer.reconstruction_error for layer in layers]
    norm = math.fsum(layer.norm**2 for layer in layers)
    lost = math.fsum(layer.absolute_error**2 for layer in layers)
    changes = [layer.relative_norm for layer in layers if layer.relative_norm is not None]
    change = f"{statistics.median(changes):.2%}" if changes else "-"
    return [
        kind,
        str(len(layers)),
        " x ".join(map(str, shapes.pop())) if len(shapes) == 1 else "several",
        f"{norm / total:.1%}" if total else "-",
        *([change] if analysis.knows_base else []),
        f"{1 - lost / norm:.2%}" if norm else "-",
        f"{statistics.median(errors):.2%}",
        f"{max(errors):.2%}",
        f"{statistics.median(layer.stable_rank for layer in layers):.1f}",
        *(_median_rank(layers, f"{share:.2f}") for share in ENERGY_SHARES),
    ]


def _median_rank(layers: Sequence[LayerAnalysis], share: str) -> str:
    """Median of what the layers need; those that need more than they hold count as the highest."""
    needed = [layer.rank_for_energy[share] for layer in layers]
    median = statistics.median_high(math.inf if rank is None else rank for rank in needed)
    if median == math.inf:
        return Markdown(f"> {max(layer.held for layer in layers)}")
    return f"{median:.0f}"


def worst_table(analysis: Analysis) -> str:
    """The layers of the largest relative error."""
    lost = math.fsum(layer.absolute_error**2 for layer in analysis.layers)
    if not lost:
        return f"None: rank {analysis.rank} keeps every delta whole."
    worst = sorted(analysis.layers, key=lambda layer: -layer.reconstruction_error)
    return columns_table(
        worst[:WORST_LAYERS],
        {
            "layer": lambda layer: code(layer.name),
            "‖Δ‖": lambda layer: f"{layer.norm:.4g}",
            "energy kept": lambda layer: f"{layer.energy_ratio:.2%}",
            "relative error": lambda layer: f"{layer.reconstruction_error:.2%}",
            "‖Δ - Δᵣ‖": lambda layer: f"{layer.absolute_error:.3g}",
            "spectral error": lambda layer: (
                "not held" if layer.spectral_error is None else f"{layer.spectral_error:.3g}"
            ),
            "share of all loss": lambda layer: f"{layer.absolute_error**2 / lost:.1%}",
        },
    )
