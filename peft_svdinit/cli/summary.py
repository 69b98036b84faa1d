"""What the verbs print of an analysis."""

from __future__ import annotations

from pathlib import Path

from .. import analysis


def print_analysis(analysis: analysis.Analysis, output_dir: str) -> None:
    """Two lines in words, and where the files are."""
    print(
        f"{len(analysis.layers)} layers; rank {analysis.rank} keeps {analysis.energy_ratio:.1%} of "
        f"the deltas' energy."
    )
    print(f"Report: {Path(output_dir) / f'svd_analysis_rank{analysis.rank}.md'}")
