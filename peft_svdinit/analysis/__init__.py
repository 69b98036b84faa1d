"""What the SVD says about a model's deltas: numbers per layer, recommended ranks, report, plots."""

from .layers import Analysis, LayerAnalysis, analyze, analyze_layer
from .plots import plot_analysis, plot_synthesis
from .rank_pattern import RankRecommendation, recommend_ranks
from .report import write_analysis

__all__ = [
    "Analysis",
    "LayerAnalysis",
    "RankRecommendation",
    "analyze",
    "analyze_layer",
    "plot_analysis",
    "plot_synthesis",
    "recommend_ranks",
    "write_analysis",
]
