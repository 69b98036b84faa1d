"""PEFT configurations of our starts."""

from .alias import config_of_alias
from .lori import LoriConfig
from .stock_saved import SIDECAR_NAME, StockSavedConfig, lora_options
from .svd import Coverage, SvdLoraConfig

__all__ = [
    "SIDECAR_NAME",
    "Coverage",
    "LoriConfig",
    "StockSavedConfig",
    "SvdLoraConfig",
    "config_of_alias",
    "lora_options",
]
