"""Sources of weight deltas: LoRA adapters, pairs of checkpoints, synthesis."""

from .adapter import LoraAdapter, LoraProduct, options_beyond_the_product
from .checkpoint_pair import CheckpointPair
from .other_tensors import Uncovered
from .synthesis import Synthesis

__all__ = [
    "CheckpointPair",
    "LoraAdapter",
    "LoraProduct",
    "Synthesis",
    "Uncovered",
    "options_beyond_the_product",
]
