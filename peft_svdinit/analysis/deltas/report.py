"""An analysis as files: JSON for programs, Markdown for people, figures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...factors import RankRecommendation
from ...files import publishing, write_text
from ..markdown import Markdown, code, document, facts, picture, section, span
from .heat_maps import plot_heat_maps
from .intruders import LayerIntruders, intruders_as_dict
from .plots import plot_analysis
from .rank_table import rank_table
from .recommendation_table import recommendation_table
from .spectra_plot import plot_spectra
from .structure_tables import intruder_table, ranks_table, spiked_layers_table, spikes_table
from .totals import Analysis
from .truncation_tables import types_table, worst_table

FORMAT_VERSION = 1
_LIMITS = (
    "Energy weighs all entries of a weight alike: what a layer's error costs in loss depends on "
    "its inputs, and only an evaluation of the truncated adapter shows it. Layers outside the "
    "analysis (embeddings, norms, biases, modules not targeted) are not counted, though "
    "fine-tuning may have changed them."
)
_PARTIAL = (
    "In {} of {} layers the held triplets carry less than 99 % of the energy: energies and errors "
    "are exact all the same, measured against the exact norm, but the rest of the spectrum is "
    "unknown."
)


def write_analysis(
    analysis: Analysis,
    output_dir: str | os.PathLike,
    *,
    title: str,
    source: Mapping[str, Any],
    recommendation: RankRecommendation | None = None,
    intruders: Sequence[LayerIntruders] | None = None,
    plots: bool = True,
) -> dict[str, Path]:
    """Write `svd_analysis_rank{r}.json`, `.md` and, with `plots`, three figures.

    Args:
        title: heading of the report and of the figure.
        source: what the deltas are and where they come from, as JSON values.
        recommendation: ranks to recommend; without it that chapter is left out.
        intruders: of every layer, if they were looked for.
        plots: False needs no matplotlib.

    Returns:
        The paths written, keyed "json", "report" and, with `plots`, "figure", "heat_maps" and
        "spectra".

    Raises:
        ImportError: if `plots` is asked for without matplotlib; nothing is written then.
        ValueError: if `source` holds NaN or an infinity, which JSON has no word for.
    """
    stem = Path(output_dir) / f"svd_analysis_rank{analysis.rank}"
    paths = {"json": stem.with_suffix(".json"), "report": stem.with_suffix(".md")}
    figures = {
        "figure": stem.with_suffix(".png"),
        "heat_maps": stem.with_name(f"{stem.name}_heat_maps.png"),
        "spectra": stem.with_name(f"{stem.name}_spectra.png"),
    }
    paths |= figures if plots else {}
    content = {
        "format_version": FORMAT_VERSION,
        "title": title,
        "source": dict(source),
        **analysis.as_dict(),
        "ranks": [asdict(row) for row in rank_table(analysis)],
        "recommendation": recommendation.as_dict() if recommendation else None,
        "intruders": None if intruders is None else intruders_as_dict(intruders),
    }
    # Before anything is written: this is where NaN is refused.
    text = json.dumps(content, indent=2, allow_nan=False)
    report = _report(analysis, title, source, recommendation, intruders, paths)
    with publishing(output_dir, replaces=[path.name for path in figures.values()]) as folder:
        if plots:
            plot_analysis(analysis, folder / figures["figure"].name, title=title)
            ranks = recommendation.ranks if recommendation else None
            heat_maps = folder / figures["heat_maps"].name
            plot_heat_maps(analysis, heat_maps, ranks=ranks, title=title)
            plot_spectra(analysis, folder / figures["spectra"].name, title=title)
        write_text(folder / paths["json"].name, text + "\n")
        write_text(folder / paths["report"].name, report)
    return paths


def _report(
    analysis: Analysis,
    title: str,
    source: Mapping[str, Any],
    recommendation: RankRecommendation | None,
    intruders: Sequence[LayerIntruders] | None,
    paths: Mapping[str, Path],
) -> str:
    pictures = {
        key: picture(caption, paths[key].name) if key in paths else ""
        for key, caption in (
            ("figure", "Errors, energies and spectra by module type"),
            ("heat_maps", "By block and module type"),
            ("spectra", "Spectra against random deltas"),
        )
    }
    partial = sum(layer.rank_for_energy["0.99"] is None for layer in analysis.changed)
    return document(
        f"# {title}",
        _headline(analysis),
        facts(_key_figures(analysis)),
        pictures["figure"],
        section("Other ranks", ranks_table(rank_table(analysis))),
        section("By module type", types_table(analysis), pictures["heat_maps"]),
        section("Layers that lose the most", worst_table(analysis)),
        section(
            "Against random deltas",
            spikes_table(analysis),
            spiked_layers_table(analysis),
            pictures["spectra"],
        ),
        section("Intruder dimensions", intruder_table(intruders) if intruders else ""),
        section(
            "Recommended ranks",
            recommendation_table(analysis, recommendation, paths["json"].name)
            if recommendation
            else "",
        ),
        section("Source", facts(source)),
        section(
            "What this does not say",
            _LIMITS + (f" {_PARTIAL.format(partial, len(analysis.layers))}" if partial else ""),
        ),
    )


def _headline(analysis: Analysis) -> str:
    return (
        f"Rank {analysis.rank} keeps **{analysis.energy_ratio:.2%}** of the energy Σ‖Δ‖² of "
        f"{len(analysis.layers)} layers: a relative Frobenius error of "
        f"{analysis.reconstruction_error:.2%} over the whole model. A LoRA of this rank on these "
        f"layers has {analysis.parameters:,} parameters."
    )


def _key_figures(analysis: Analysis) -> dict[str, str]:
    zero = analysis.zero_layers
    if not analysis.changed:
        same = Markdown("**Every delta is zero**: the two models are the same here")
        return {"changed layers": same}
    errors = analysis.error_summary
    held = [layer.held for layer in analysis.layers]
    figures = {
        "error of a layer": f"{errors['median']:.2%} in the median, {errors['mean']:.2%} in the "
        f"mean, from {errors['min']:.2%} to {errors['max']:.2%}",
        "layers with half of the energy": f"{_with_half(analysis)} of {len(analysis.changed)} "
        "that changed",
        "triplets held": span(min(held), max(held)),
    }
    if zero:
        named = ", ".join(map(code, zero[:8])) + (", …" if len(zero) > 8 else "")
        figures["layers with a zero delta, not counted"] = Markdown(f"{len(zero)}: {named}")
    return figures


def _with_half(analysis: Analysis) -> int:
    """The layers that hold half of the energy: how concentrated the change is."""
    shares = sorted((layer.norm**2 for layer in analysis.changed), reverse=True)
    half, running, count = math.fsum(shares) / 2, 0.0, 0
    while running < half:
        running += shares[count]
        count += 1
    return count
