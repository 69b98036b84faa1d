"""Several layers together: by module type, their spectra and their spikes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

from ..canvas import OTHER, shown_types
from .layers import LayerAnalysis
from .totals import Analysis

MARKS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def changed_by_type(analysis: Analysis, most: int) -> dict[str, list[LayerAnalysis]]:
    """The layers that changed; beyond `most` module types the rarest share the last group."""
    kinds = [analysis.module_types[layer.name] for layer in analysis.changed]
    shown = shown_types(kinds, most)
    groups: dict[str, list[LayerAnalysis]] = {kind: [] for kind in shown}
    for kind, layer in zip(kinds, analysis.changed, strict=True):
        groups.setdefault(kind if kind in shown else OTHER, []).append(layer)
    return groups


def quantiles(
    spectra: Iterable[Sequence[float]], floor: float
) -> tuple[list[float], list[float], list[float]]:
    """10, 50 and 90 % at each index, over the spectra that hold a value above `floor` there."""
    spectra = list(spectra)
    rows = []
    for index in range(max(map(len, spectra))):
        values = [s[index] for s in spectra if len(s) > index and s[index] > floor]
        if not values:
            break
        rows.append(torch.tensor(values, dtype=torch.float64).quantile(MARKS).tolist())
    low, median, high = map(list, zip(*rows, strict=True))
    return low, median, high


def spike_count(layers: Sequence[LayerAnalysis]) -> str:
    """Median and range of the layers' spikes; a lower bound where all held values are spikes."""
    counts = [layer.spikes.count for layer in layers]
    mark = "" if all(layer.spikes.complete for layer in layers) else "≥ "
    spread = f" ({min(counts)} to {max(counts)})" if min(counts) < max(counts) else ""
    return f"{mark}{statistics.median(counts):g}{spread}"
