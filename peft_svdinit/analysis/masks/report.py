"""A mask, or a comparison of several, as files: JSON for programs, Markdown for people, figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...files import publishing, write_text
from ...masks import LoriMask
from ..canvas import shortened
from ..markdown import bullets, document, facts, picture, section
from .density_plot import plot_mask
from .entries_plot import plot_mask_entries
from .overlap import Comparison
from .overlap_plot import plot_mask_overlap
from .statistics import MaskStatistics, check_fits, mask_statistics
from .tables import (
    density_table,
    energy_table,
    group_table,
    layer_table,
    mask_table,
    pair_table,
    spread_table,
)
from .words import mask_in_words

FORMAT_VERSION = 1
REPORT, FIGURE, ENTRIES_FIGURE, OVERLAP_FIGURE = (
    "mask_report",
    "mask.png",
    "mask_entries.png",
    "mask_overlap.png",
)
MASK_FIGURES = (FIGURE, ENTRIES_FIGURE, OVERLAP_FIGURE)
_LIMITS = (
    "Magnitudes say where training moved B, not which entries the task needs: whether a mask "
    "beats a random one is answered by training both. The first steps of Adam move every entry by "
    "about the learning rate, so that after a short calibration the largest entries are those "
    "whose gradient kept its sign, and types and blocks differ little. Which entries of a row are "
    "kept is of use over the same A only: with another the columns of B mean other directions."
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
    masks = mask.masks
    if lora_B is not None:
        check_fits(masks, lora_B)
    says_something = lora_B is not None and any(
        bool(lora_B[name].cpu()[~kept].any()) for name, kept in masks.items()
    )
    statistics = mask_statistics(masks, lora_B if says_something else None)
    content = {"format_version": FORMAT_VERSION, "mask": described(mask), **statistics.as_dict()}
    text = json.dumps(content, indent=2, allow_nan=False)
    pictures = [
        picture("Density by block, type and layer", FIGURE),
        picture("Entries of B", ENTRIES_FIGURE),
    ]
    report = document(
        "# LoRI mask",
        bullets(mask_in_words(mask, statistics)),
        *(pictures if plots else []),
        section("Rows and columns", spread_table(statistics)),
        section("Energy of B", energy_table(statistics)),
        section("By module type", group_table("module type", statistics.types)),
        section("By block", group_table("block", statistics.blocks)),
        section("Fullest and emptiest layers", layer_table(statistics)),
        section("What it was made with", facts(described(mask))),
        section("What this does not say", _LIMITS),
    )
    with publishing(output_dir, replaces=MASK_FIGURES) as folder:
        if plots:
            kind = shortened(mask.source.get("kind", "mask"))
            title = f"LoRI mask: {kind}, scope {shortened(mask.scope)}"
            plot_mask(statistics, folder / FIGURE, title=title)
            plot_mask_entries(masks, folder / ENTRIES_FIGURE, lora_B=lora_B, title=title)
        write_text(folder / f"{REPORT}.json", text + "\n")
        write_text(folder / f"{REPORT}.md", report)
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
    types = {label: found.types for label, found in statistics.items()}
    blocks = {label: found.blocks for label, found in statistics.items()}
    report = document(
        "# LoRI masks compared",
        pair_table(comparison),
        picture("What each pair shares", OVERLAP_FIGURE) if plots else "",
        section("Masks", mask_table(masks, statistics)),
        section("Density by module type [%]", density_table(types)),
        section("Density by block [%]", density_table(blocks)),
    )
    with publishing(output_dir, replaces=MASK_FIGURES) as folder:
        if plots:
            title = f"{len(masks)} LoRI masks: what each pair shares"
            plot_mask_overlap(comparison, folder / OVERLAP_FIGURE, title=title)
        write_text(folder / f"{REPORT}.json", text + "\n")
        write_text(folder / f"{REPORT}.md", report)


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
