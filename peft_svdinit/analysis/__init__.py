"""What the SVD says about a model's deltas: numbers per layer, recommended ranks, report, plots."""

from .heat_maps import plot_heat_maps
from .intruders import LayerIntruders, find_intruders
from .layers import Analysis, LayerAnalysis, analyze, analyze_layer
from .plots import plot_analysis
from .random_spectrum import RandomAdapter, RandomDelta, random_reference
from .rank_choices import RankChoice, ranks_for_energy, ranks_for_error
from .rank_pattern import RankRecommendation, recommend_ranks
from .rank_table import RankRow, rank_table
from .report import write_analysis
from .spectra import HasSpectrum, Spectrum
from .spectra_plot import plot_spectra
from .spikes import Spikes, find_spikes
from .synthesis_plot import plot_synthesis

__all__ = [
    "Analysis",
    "HasSpectrum",
    "LayerAnalysis",
    "LayerIntruders",
    "RandomAdapter",
    "RandomDelta",
    "RankChoice",
    "RankRecommendation",
    "RankRow",
    "Spectrum",
    "Spikes",
    "analyze",
    "analyze_layer",
    "find_intruders",
    "find_spikes",
    "plot_analysis",
    "plot_heat_maps",
    "plot_spectra",
    "plot_synthesis",
    "random_reference",
    "rank_table",
    "ranks_for_energy",
    "ranks_for_error",
    "recommend_ranks",
    "write_analysis",
]
