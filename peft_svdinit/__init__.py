"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package registers it with PEFT; `unregister()` undoes that.
"""

from .config import SvdLoraConfig
from .factors import LowRankFactors
from .factors_file import FactorsFile, FactorsMetadata, save_factors
from .initializers import SvdGuided
from .registration import register, unregister
from .tuner import initialize_lora_from_factors

__version__ = "0.1.0"
__all__ = [
    "FactorsFile",
    "FactorsMetadata",
    "LowRankFactors",
    "SvdGuided",
    "SvdLoraConfig",
    "initialize_lora_from_factors",
    "register",
    "save_factors",
    "unregister",
]

register()
