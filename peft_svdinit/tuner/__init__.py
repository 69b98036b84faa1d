"""What knows PEFT's internals: its LoRA tuner, with starts of our own."""

from .adapter_layers import lora_layers, lora_scalings
from .model import SvdLoraModel
from .svd_start import initialize_layers, initialize_lora_from_factors

__all__ = [
    "SvdLoraModel",
    "initialize_layers",
    "initialize_lora_from_factors",
    "lora_layers",
    "lora_scalings",
]
