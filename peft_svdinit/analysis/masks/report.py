"""A mask, or a comparison of several, as files: JSON for programs, Markdown for people, figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...files import write_text
from ...masks import LoriMask
from ..markdown import markdown_table
from .density_plot import plot_mask
from .entries_plot import plot_mask_entries
from .overlap import Comparison
from .overlap_plot import plot_mask_overlap
from .statistics import Group, MaskStatistics, check_fits, mask_statistics
from .words import comparison_in_words, mask_in_words

FORMAT_VERSION = 1
REPORT, FIGURE, ENTRIES_FIGURE, OVERLAP_FIGURE = (
    "mask_report",
    "mask.png",
    "mask_entries.png",
    "mask_overlap.png",
)
_EXTREMES = 5
_LIMITS = (
    "Magnitudes say where training moved B, not which entries the task needs: whether a mask "
    "beats a random one is answered by training both. The first steps of Adam move every entry by "
    "about the learning rate, so that after a short calibration the largest entries are those "
    "whose gradient kept its sign, and types and blocks differ little."
)


def write_mask_report(
    mask: LoriMask,
    output_dir: str | os.PathLike,
    *,
    lora_B: Mapping[str, Float[Tensor, "out rank"]] | None = None,
    plots: bool = True,
) -> MaskStatistics:
    """Write `mask_report.json`, `mask_report.md` and, with `plots`, two figures.

    Args:
        lora_B: of the calibration run, or any B to measure the mask by. One that is zero off the
            mask, as that of an adapter trained with it, is drawn and measures nothing.
        plots: False needs no matplotlib.

    Returns:
        The numbers.

    Raises:
        ImportError: if `plots` is asked for without matplotlib; nothing is written then.
        ValueError: as `mask_statistics`.
    """
    folder, masks = Path(output_dir), mask.masks
    if lora_B is not None:
        check_fits(masks, lora_B)
    says_something = lora_B is not None and any(
        bool(lora_B[name].cpu()[~kept].any()) for name, kept in masks.items()
    )
    statistics = mask_statistics(masks, lora_B if says_something else None)
    content = {"format_version": FORMAT_VERSION, "mask": described(mask), **statistics.as_dict()}
    text = json.dumps(content, indent=2, allow_nan=False)
    figures = {}
    if plots:
        title = f"LoRI mask: {mask.source.get('kind', 'mask')}, scope {mask.scope}"
        plot_mask(statistics, folder / FIGURE, title=title)
        plot_mask_entries(masks, folder / ENTRIES_FIGURE, lora_B=lora_B, title=title)
        figures = {"Density by block, type and layer": FIGURE, "Entries of B": ENTRIES_FIGURE}
    write_text(folder / f"{REPORT}.json", text + "\n")
    blocks = [
        "# LoRI mask",
        _bullets(mask_in_words(mask, statistics)),
        *(f"![{caption}]({name})" for caption, name in figures.items()),
        "## By module type",
        _group_table("module type", statistics.types),
        "## By block",
        _group_table("block", statistics.blocks),
        "## Fullest and emptiest layers",
        _layer_table(statistics),
        "## What it was made with",
        markdown_table(("", ""), ((key, value) for key, value in described(mask).items())),
        "## What this does not say",
        _LIMITS,
    ]
    write_text(folder / f"{REPORT}.md", "\n\n".join(blocks) + "\n")
    return statistics


def write_mask_comparison(
    comparison: Comparison,
    masks: Mapping[str, LoriMask],
    output_dir: str | os.PathLike,
    *,
    plots: bool = True,
) -> None:
    """Write `mask_report.json`, `mask_report.md` and, with `plots`, `mask_overlap.png`.

    Raises:
        ImportError: if `plots` is asked for without matplotlib; nothing is written then.
    """
    folder = Path(output_dir)
    names = list(next(iter(masks.values())).layers)
    statistics = {
        label: mask_statistics({name: mask.layers[name].mask for name in names})
        for label, mask in masks.items()
    }
    content = {
        "format_version": FORMAT_VERSION,
        "masks": {
            label: {**described(mask), **statistics[label].as_dict()}
            for label, mask in masks.items()
        },
        **comparison.as_dict(),
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    if plots:
        title = f"{len(masks)} LoRI masks: what each pair shares"
        plot_mask_overlap(comparison, folder / OVERLAP_FIGURE, title=title)
    write_text(folder / f"{REPORT}.json", text + "\n")
    blocks = [
        "# LoRI masks compared",
        _bullets(comparison_in_words(comparison)),
        *([f"![What each pair shares]({OVERLAP_FIGURE})"] if plots else []),
        "## Masks",
        markdown_table(
            ("mask", "made by", "seed of A", "entries", "kept", "rows in use", "half in rows"),
            [_mask_row(label, masks[label], found) for label, found in statistics.items()],
        ),
        "## Density by module type [%]",
        _density_table([found.types for found in statistics.values()], list(masks)),
        "## Density by block [%]",
        _density_table([found.blocks for found in statistics.values()], list(masks)),
    ]
    write_text(folder / f"{REPORT}.md", "\n\n".join(blocks) + "\n")


def described(mask: LoriMask) -> dict[str, Any]:
    """What a mask was made with, JSON-ready."""
    return {
        "density": mask.density,
        "scope": mask.scope,
        "floor": mask.floor,
        "seed": mask.seed,
        "source": dict(mask.source),
        "base_model_name_or_path": mask.base_model_name_or_path,
    }


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _group_table(name: str, groups: Sequence[Group]) -> str:
    return markdown_table(
        (name, "entries", "kept", "density", "times its share", "random mask"),
        [
            (
                group.name,
                f"{group.size:,}",
                f"{group.kept:,}",
                f"{group.density:.2%}",
                f"{group.share:.2f}",
                f"± {1.96 * group.deviation:.2%}",
            )
            for group in groups
        ],
    )


def _layer_table(statistics: MaskStatistics) -> str:
    ordered = sorted(statistics.layers, key=lambda layer: -layer.density)
    few = len(ordered) <= 2 * _EXTREMES
    shown = ordered if few else [*ordered[:_EXTREMES], *ordered[-_EXTREMES:]]
    return markdown_table(
        ("layer", "B", "kept", "density", "rows in use", "columns in use", "energy kept"),
        [
            (
                f"`{layer.name}`",
                f"{layer.shape[0]} x {layer.shape[1]}",
                f"{layer.kept:,}",
                f"{layer.density:.2%}",
                f"{layer.rows.used:,}",
                f"{layer.columns.used:,}",
                "-" if layer.energy is None else f"{layer.energy.kept:.1%}",
            )
            for layer in shown
        ],
    )


def _mask_row(label: str, mask: LoriMask, found: MaskStatistics) -> tuple[str, ...]:
    return (
        label,
        str(mask.source.get("kind", "-")),
        str(mask.seed),
        f"{found.size:,}",
        f"{found.kept:,} ({found.density:.2%})",
        f"{found.rows.used / found.rows.lines:.1%}",
        f"{found.rows.half:.1%}",
    )


def _density_table(columns: Sequence[Sequence[Group]], labels: Sequence[str]) -> str:
    return markdown_table(
        ("", *labels),
        [
            (groups[0].name, *(f"{100 * group.density:.2f}" for group in groups))
            for groups in zip(*columns, strict=True)
        ],
    )
