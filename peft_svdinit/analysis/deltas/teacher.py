"""The folder of a teacher: its factors, their analysis, reports and pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...factors import (
    Extraction,
    HasSpectrum,
    LowRankFactors,
    Spectrum,
    recommend_ranks,
    save_factors,
)
from ...files import publishing
from .intruders import LayerIntruders
from .report import write_analysis
from .synthesis_plot import plot_synthesis
from .totals import Analysis, analyze

_SYNTHESIS = "synthesis.png"
_TITLES = {
    "adapter": "SVD analysis of an adapter",
    "synthesised": "SVD analysis of a synthesised teacher",
    "checkpoints": "SVD analysis of a fine-tune",
}


def write_teacher(
    extraction: Extraction,
    output_dir: str | os.PathLike,
    *,
    rank: int,
    original: Mapping[str, LowRankFactors] | None = None,
    notes: Mapping[str, Any] | None = None,
    plots: bool = True,
) -> Analysis:
    """Write `factors.safetensors` and the analysis at `rank` into `output_dir`.

    Args:
        extraction: the teacher's factors and where they come from.
        rank: the student's rank, at which energy and error are reported.
        original: of a synthesised teacher the adapter's own factors; draws what was appended.
        notes: further facts for the report's table of sources.
        plots: draw the figures (needs the extra `report`).

    Returns:
        The analysis.
    """
    with publishing(output_dir, replaces=[_SYNTHESIS]) as folder:
        save_factors(
            folder, extraction.factors, extraction.metadata, base_samples=extraction.base_samples
        )
        analysis = write_factors_analysis(
            extraction.factors,
            folder,
            rank=rank,
            source={**asdict(extraction.metadata), **(notes or {})},
            plots=plots,
        )
        if original is not None and plots:
            plot_synthesis(original, extraction.factors, folder / _SYNTHESIS)
    return analysis


def write_factors_analysis(
    factors: Mapping[str, HasSpectrum],
    output_dir: str | os.PathLike,
    *,
    rank: int,
    source: Mapping[str, Any],
    energy: float | None = None,
    error: float | None = None,
    max_parameters: int | None = None,
    base_norms: Mapping[str, float] | None = None,
    intruders: Sequence[LayerIntruders] | None = None,
    plots: bool = True,
) -> Analysis:
    """Analyse factors at `rank` and write JSON, report and figures into `output_dir`.

    Recommended ranks aim at the share `energy` of all layers' energy or at the relative `error` of
    all layers together, within `max_parameters`. With none of the three they aim at 90 % of the
    energy with no more parameters than the uniform rank has.

    Args:
        factors: of the deltas, or their `Spectrum`s, by full module name.
        rank: at which energy and error are reported.
        source: what the deltas are and where they come from, as JSON values.
        base_norms: ‖weight‖_F of each layer before fine-tuning, if the base model is at hand.
        intruders: of each layer, if they were looked for.
        plots: draw the figures (needs the extra `report`).

    Raises:
        ValueError: if both `energy` and `error` are given, or as `analyze` and `recommend_ranks`.
    """
    if energy is not None and error is not None:
        raise ValueError("energy and error say the same in two ways; give one of them")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"error must be in (0, 1), got {error}; write 5 % as 0.05")
    # Each layer is read once, where it comes from a disk.
    spectra = {name: Spectrum(layer.S, layer.norm, layer.shape) for name, layer in factors.items()}
    analysis = analyze(spectra, rank, base_norms=base_norms)
    if energy is None and error is None and max_parameters is None:
        energy, max_parameters = 0.9, sum(layer.parameters for layer in analysis.layers)
    target = energy if error is None else 1 - error**2
    recommendation = recommend_ranks(spectra, energy=target, max_parameters=max_parameters)
    about: Mapping[str, Any] = source.get("source", {})
    flat = {
        key: value
        for key, value in {**source, **about, "source": None}.items()
        if value not in (None, {})
    }
    write_analysis(
        analysis,
        output_dir,
        title=_TITLES.get(str(about.get("kind")), "SVD analysis of deltas"),
        source=flat,
        recommendation=recommendation,
        intruders=intruders,
        plots=plots,
    )
    return analysis
