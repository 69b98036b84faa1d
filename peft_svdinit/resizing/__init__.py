"""LoRA adapters of other ranks: every delta is the optimum of its rank, with its exact error."""

from .record import Resized, ResizedLayer
from .resize import DTYPES, Dtype, resize
from .target import RankTarget

__all__ = ["DTYPES", "Dtype", "RankTarget", "Resized", "ResizedLayer", "resize"]
