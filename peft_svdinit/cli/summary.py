"""What the verbs print."""

from __future__ import annotations

from pathlib import Path

from .. import analysis
from ..files import printable


def say(text: str) -> None:
    """Print `text`: its names are strangers' words, none of which a terminal is to obey."""
    print(printable(text))


def print_analysis(analysis: analysis.Analysis, output_dir: str) -> None:
    """Two lines in words, and where the files are."""
    say(
        f"{len(analysis.layers)} layers; rank {analysis.rank} keeps {analysis.energy_ratio:.1%} of "
        f"the deltas' energy."
    )
    say(f"Report: {Path(output_dir) / f'svd_analysis_rank{analysis.rank}.md'}")
