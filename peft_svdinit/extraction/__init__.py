"""From a source of deltas to the factors of every layer: in memory, or streamed and resumable."""

from .factorisation import Factorisation
from .in_memory import Extraction, base_samples, factors_of_adapter, factors_of_checkpoints
from .layer_store import LayerStore
from .streaming import fill_store

__all__ = [
    "Extraction",
    "Factorisation",
    "LayerStore",
    "base_samples",
    "factors_of_adapter",
    "factors_of_checkpoints",
    "fill_store",
]
