"""Comparing training runs fairly: seeds, budgets with the teacher's cost counted, a report."""

from __future__ import annotations

from peft_svdinit.comparison.compare import Comparison, compare_runs
from peft_svdinit.comparison.output import ComparisonPaths, write_comparison
from peft_svdinit.comparison.wording import headline

__all__ = ["Comparison", "ComparisonPaths", "compare_runs", "headline", "write_comparison"]
