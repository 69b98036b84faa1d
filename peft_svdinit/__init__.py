"""LoRA adapters that start from knowledge: SVD-guided initialisation for PEFT.

Importing this package registers it with PEFT; `unregister()` undoes that.
"""

from .config import LoriConfig, SvdLoraConfig
from .factor_sources import (
    LineSearch,
    activation_factors,
    base_samples,
    descent_directions,
    gradient_factors,
    line_search,
    lora_ga_factors,
    scaled,
    weight_factors,
    weight_norms,
)
from .factors import LowRankFactors
from .factors_file import FactorsFile, FactorsMetadata, save_factors
from .initializers import SvdGuided
from .registration import register, unregister
from .tuner import initialize_lora_from_factors

__version__ = "0.1.0"
__all__ = [
    "FactorsFile",
    "FactorsMetadata",
    "LineSearch",
    "LoriConfig",
    "LowRankFactors",
    "SvdGuided",
    "SvdLoraConfig",
    "activation_factors",
    "base_samples",
    "descent_directions",
    "gradient_factors",
    "initialize_lora_from_factors",
    "line_search",
    "lora_ga_factors",
    "register",
    "save_factors",
    "scaled",
    "unregister",
    "weight_factors",
    "weight_norms",
]

register()
