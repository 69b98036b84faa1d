"""An analysis as files: JSON for programs, Markdown for people, figures."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...factors import RankRecommendation
from ...files import write_text
from ...models import layer_depth
from ..markdown import markdown_table
from .heat_maps import plot_heat_maps
from .intruders import LayerIntruders, intruder_total
from .layers import ENERGY_SHARES, Analysis, LayerAnalysis
from .plots import plot_analysis
from .rank_table import rank_table
from .spectra_plot import plot_spectra
from .structure_report import intruder_chapter, rank_chapter, spikes_chapter

FORMAT_VERSION = 1
WORST_LAYERS = 10


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
        source: what the deltas are and where they come from, as JSON values; shown as a table.
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
    content = {
        "format_version": FORMAT_VERSION,
        "title": title,
        "source": dict(source),
        **analysis.as_dict(),
        "ranks": [row.as_dict() for row in rank_table(analysis)],
        "recommendation": recommendation.as_dict() if recommendation else None,
        "intruders": None if intruders is None else _intruders(intruders),
    }
    # Before anything is written: this is where NaN is refused.
    text = json.dumps(content, indent=2, allow_nan=False)
    if plots:
        paths["figure"] = stem.with_suffix(".png")
        plot_analysis(analysis, paths["figure"], title=title)
        paths["heat_maps"] = stem.with_name(f"{stem.name}_heat_maps.png")
        ranks = recommendation.ranks if recommendation else None
        plot_heat_maps(analysis, paths["heat_maps"], ranks=ranks, title=title)
        paths["spectra"] = stem.with_name(f"{stem.name}_spectra.png")
        plot_spectra(analysis, paths["spectra"], title=title)
    write_text(paths["json"], text + "\n")
    write_text(paths["report"], _report(analysis, title, source, recommendation, intruders, paths))
    return paths


def _intruders(layers: Sequence[LayerIntruders]) -> dict[str, Any]:
    return {
        "total": intruder_total(layers),
        "threshold": layers[0].threshold if layers else None,
        "layers": {layer.name: layer.as_dict() for layer in layers},
    }


def _report(
    analysis: Analysis,
    title: str,
    source: Mapping[str, Any],
    recommendation: RankRecommendation | None,
    intruders: Sequence[LayerIntruders] | None,
    paths: Mapping[str, Path],
) -> str:
    blocks = [f"# {title}", _source_table(source), "## Summary", *_summary(analysis)]
    if "figure" in paths:
        blocks.append(f"![Errors, energies and spectra by module type]({paths['figure'].name})")
    blocks += ["## Other ranks", *rank_chapter(rank_table(analysis))]
    blocks += ["## By module type", *_type_chapter(analysis)]
    if "heat_maps" in paths:
        blocks.append(f"![By block and module type]({paths['heat_maps'].name})")
    blocks += ["## Layers that lose the most", *_worst_chapter(analysis)]
    blocks += ["## Against random deltas", *spikes_chapter(analysis)]
    if "spectra" in paths:
        blocks.append(f"![Spectra against random deltas]({paths['spectra'].name})")
    if intruders:
        blocks += ["## Intruder dimensions", *intruder_chapter(intruders)]
    if recommendation:
        blocks += ["## Recommended ranks", *_rank_chapter(analysis, recommendation, paths["json"])]
    blocks += ["## What this does not say", _limits(analysis)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _source_table(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    rows = ((key, "-" if value is None else value) for key, value in source.items())
    return markdown_table(("source", "value"), rows).replace("| ---: |", "| --- |", 1)


def _summary(analysis: Analysis) -> list[str]:
    errors = analysis.error_summary
    zero = analysis.zero_layers
    held = [layer.held for layer in analysis.layers]
    span = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
    sentences = [
        f"At rank {analysis.rank} the best approximation keeps **{analysis.energy_ratio:.2%}** of "
        f"the energy Σ‖Δ‖² of {len(analysis.layers)} layers: a relative Frobenius error of "
        f"{analysis.reconstruction_error:.2%} over the whole model. A LoRA of this rank on these "
        f"layers has {analysis.parameters:,} parameters.",
    ]
    if analysis.changed:
        sentences.append(
            f"Layer by layer the error is {errors['median']:.2%} in the median "
            f"(mean {errors['mean']:.2%}, from {errors['min']:.2%} to {errors['max']:.2%}). "
            f"{_share_sentence(analysis)} The factors hold {span} triplets a layer."
        )
    if len(zero) == len(analysis.layers):
        sentences.append("**Every delta is zero**: the two models are the same in these layers.")
    elif zero:
        named = ", ".join(f"`{name}`" for name in zero[:8]) + (", …" if len(zero) > 8 else "")
        sentences.append(f"{len(zero)} layers have a zero delta and are not counted: {named}.")
    return sentences


def _share_sentence(analysis: Analysis) -> str:
    """How concentrated the change is: the layers that hold half of the energy."""
    shares = sorted((layer.norm**2 for layer in analysis.changed), reverse=True)
    half, running, count = math.fsum(shares) / 2, 0.0, 0
    while running < half:
        running += shares[count]
        count += 1
    return f"Half of the total energy sits in {count} of {len(shares)} changed layers."


def _type_chapter(analysis: Analysis) -> list[str]:
    groups: dict[str, list[LayerAnalysis]] = defaultdict(list)
    for layer in analysis.layers:
        groups[analysis.module_types[layer.name]].append(layer)
    total = analysis.norm**2
    rows = []
    for kind, layers in groups.items():
        shapes = {layer.shape for layer in layers}
        errors = [layer.reconstruction_error for layer in layers]
        norm = math.fsum(layer.norm**2 for layer in layers)
        lost = math.fsum(layer.absolute_error**2 for layer in layers)
        rows.append(
            (
                kind,
                len(layers),
                " x ".join(map(str, shapes.pop())) if len(shapes) == 1 else "several",
                f"{norm / total:.1%}" if total else "-",
                *_relative_norm(layers),
                f"{1 - lost / norm:.2%}" if norm else "-",
                f"{statistics.median(errors):.2%}",
                f"{max(errors):.2%}",
                f"{statistics.median(layer.stable_rank for layer in layers):.1f}",
                *(_median_rank(layers, f"{share:.2f}") for share in ENERGY_SHARES),
            )
        )
    header = (
        "module",
        "layers",
        "out x in",
        "share of Σ‖Δ‖²",
        *(["‖Δ‖ / ‖W‖"] if _knows_base(analysis.layers) else []),
        "energy kept",
        "median error",
        "worst error",
        "stable rank",
        *(f"rank for {share:.0%}" for share in ENERGY_SHARES),
    )
    return [
        markdown_table(header, rows),
        "Stable rank and the ranks for 90, 95 and 99 % of a layer's energy are medians over the "
        "layers; `> n` says that the n held triplets do not reach it.",
    ]


def _knows_base(layers: Sequence[LayerAnalysis]) -> bool:
    return any(layer.relative_norm is not None for layer in layers)


def _relative_norm(layers: Sequence[LayerAnalysis]) -> list[str]:
    known = [layer.relative_norm for layer in layers if layer.relative_norm is not None]
    return [f"{statistics.median(known):.2%}"] if known else []


def _median_rank(layers: Sequence[LayerAnalysis], share: str) -> str:
    """Median of what the layers need; those that need more than they hold count as the highest."""
    needed = [layer.rank_for_energy[share] for layer in layers]
    median = statistics.median_high(math.inf if rank is None else rank for rank in needed)
    return f"> {max(layer.held for layer in layers)}" if median == math.inf else f"{median:.0f}"


def _worst_chapter(analysis: Analysis) -> list[str]:
    lost = math.fsum(layer.absolute_error**2 for layer in analysis.layers)
    if not lost:
        return [f"None: rank {analysis.rank} keeps every delta whole."]
    worst = sorted(analysis.layers, key=lambda layer: -layer.reconstruction_error)
    rows = [
        (
            f"`{layer.name}`",
            f"{layer.norm:.4g}",
            f"{layer.energy_ratio:.2%}",
            f"{layer.reconstruction_error:.2%}",
            f"{layer.absolute_error:.3g}",
            "not held" if layer.spectral_error is None else f"{layer.spectral_error:.3g}",
            f"{layer.absolute_error**2 / lost:.1%}",
        )
        for layer in worst[:WORST_LAYERS]
    ]
    header = (
        "layer",
        "‖Δ‖",
        "energy kept",
        "relative error",
        "error",
        "spectral error",
        "share of all loss",
    )
    return [
        markdown_table(header, rows),
        "`error` is ‖Δ - Δᵣ‖ in the Frobenius norm, √Σσᵢ² over i > r; `spectral error` is σᵣ₊₁, "
        "the largest singular value that is cut.",
    ]


def _rank_chapter(
    analysis: Analysis, recommendation: RankRecommendation, json_path: Path
) -> list[str]:
    ranks = recommendation.ranks
    paragraphs = [
        f"{_why(recommendation)} The ranks below capture **{recommendation.energy:.2%}** of Σ‖Δ‖² "
        f"with {recommendation.parameters:,} parameters; their predicted relative error is "
        f"{recommendation.error:.2%} over the whole model{_error_span(recommendation)}. "
        f"As many parameters spent uniformly (rank {recommendation.uniform_rank:.1f} everywhere) "
        f"capture {recommendation.uniform_energy:.2%}.",
        f'In Python, for `LoraConfig`: `json.load(open("{json_path.name}"))'
        '["recommendation"]["config"]` holds `r`, `lora_alpha`, `rank_pattern` and '
        "`alpha_pattern`, with alpha = rank in every layer; `errors` beside it holds the predicted "
        "error of each.",
        "In the table: rank, and in brackets the predicted relative error of the layer.",
    ]
    kinds = list(dict.fromkeys(analysis.module_types.values()))
    cells: dict[Any, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in ranks:
        depth = layer_depth(name)
        cells["-" if depth is None else depth][analysis.module_types[name]].append(name)
    rows = [
        (depth, *(_cell(recommendation, row[kind]) if kind in row else "" for kind in kinds))
        for depth, row in cells.items()
    ]
    return [*paragraphs, markdown_table(("block", *kinds), rows)]


def _cell(recommendation: RankRecommendation, names: Sequence[str]) -> str:
    """Rank and error of the layers in one cell of the table; their spans if they are several."""
    ranks = [recommendation.ranks[name] for name in names]
    errors = [recommendation.errors[name] for name in names]
    low, high = min(ranks), max(ranks)
    rank = str(low) if low == high else f"{low} to {high}"
    best, worst = f"{min(errors):.0%}", f"{max(errors):.0%}"
    return f"{rank} ({best if best == worst else f'{best} to {worst}'})"


def _error_span(recommendation: RankRecommendation) -> str:
    errors = recommendation.errors.values()
    return f", from {min(errors):.2%} to {max(errors):.2%} in its layers" if errors else ""


def _why(recommendation: RankRecommendation) -> str:
    budget = recommendation.max_parameters
    target = recommendation.target
    wish = []
    if target is not None:
        wish.append(f"a target of {target:.1%} of the energy")
    if budget is not None:
        wish.append(f"a budget of {budget:,} parameters")
    end = {
        "energy": "the target is reached.",
        "budget": "the budget is spent.",
        "max_rank": "every layer is at the highest rank allowed.",
        "held": "every held triplet is used; an extraction at a higher rank would offer more.",
    }[recommendation.limit]
    missed = " The target is **not** reached." if recommendation.reached is False else ""
    return f"Given {' and '.join(wish)}: {end}{missed}"


def _limits(analysis: Analysis) -> str:
    lines = [
        "Energy weighs all entries of a weight alike. How much a layer's error costs in loss "
        "depends on its inputs, which this analysis does not see; only an evaluation of the "
        "truncated adapter does.",
        "Layers outside the analysis (embeddings, norms, biases, modules not targeted) are not "
        "counted, though fine-tuning may have changed them.",
    ]
    partial = sum(layer.rank_for_energy["0.99"] is None for layer in analysis.changed)
    if partial:
        lines.append(
            f"In {partial} of {len(analysis.layers)} layers the held triplets carry less than 99 % "
            "of the energy. Energies and errors are exact all the same, since they are measured "
            "against the exact norm; the spectrum beyond the held triplets is unknown."
        )
    return "\n".join(f"- {line}" for line in lines)
