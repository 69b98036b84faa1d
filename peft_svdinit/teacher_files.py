"""The folder of a teacher: its factors, their analysis, reports and pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .analysis import Analysis, analyze, recommend_ranks, write_analysis
from .analysis.plots import plot_synthesis
from .extraction import Extraction
from .factors import LowRankFactors
from .factors_file import save_factors

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
    folder = Path(output_dir)
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
        plot_synthesis(original, extraction.factors, folder / "synthesis.png")
    return analysis


def write_factors_analysis(
    factors: Mapping[str, LowRankFactors],
    output_dir: str | os.PathLike,
    *,
    rank: int,
    source: Mapping[str, Any],
    energy: float = 0.9,
    max_parameters: int | None = None,
    plots: bool = True,
) -> Analysis:
    """Analyse factors at `rank` and write JSON, report and figure into `output_dir`.

    Recommended ranks aim at the share `energy` of all layers' energy, within `max_parameters`
    (that of the uniform rank if None).
    """
    analysis = analyze(factors, rank)
    budget = max_parameters or sum(layer.parameters for layer in analysis.layers)
    recommendation = recommend_ranks(factors, energy=energy, max_parameters=budget)
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
        plots=plots,
    )
    return analysis
