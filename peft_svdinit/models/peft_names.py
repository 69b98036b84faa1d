"""What PEFT calls the files of a saved adapter and the tensors in them."""

from __future__ import annotations

from typing import Literal

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What PEFT puts before the names of the base model's modules and parameters.
PREFIX = "base_model.model."


def lora_key(name: str, part: Literal["A", "B"]) -> str:
    """The saved name of `lora_A` or `lora_B` of a module."""
    return f"{PREFIX}{name}.lora_{part}.weight"
