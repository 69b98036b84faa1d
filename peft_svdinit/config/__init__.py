"""PEFT configurations of our starts."""

from .alias import config_of_alias
from .stock_saved import SIDECAR_NAME, StockSavedConfig, lora_options
from .svd import Coverage, SvdLoraConfig

__all__ = [
    "SIDECAR_NAME",
    "Coverage",
    "StockSavedConfig",
    "SvdLoraConfig",
    "config_of_alias",
    "lora_options",
]
