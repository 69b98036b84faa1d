"""Several LoRA adapters as one, with the error against their exact sum and their interference."""

from .merge import merge
from .methods import METHODS, MajoritySign, MergeMethod, Method
from .record import Merged, MergedLayer, Pair

__all__ = [
    "METHODS",
    "MajoritySign",
    "MergeMethod",
    "Merged",
    "MergedLayer",
    "Method",
    "Pair",
    "merge",
]
