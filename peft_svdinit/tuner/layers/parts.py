"""The linear parts A and B of a LoRA layer."""

from __future__ import annotations

from typing import cast

from peft.tuners.lora.layer import LoraLayer
from torch import nn


def lora_linears(module: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
    """A and B of an adapter on a linear layer, as the modules that PEFT makes of them."""
    return cast(nn.Linear, module.lora_A[adapter_name]), cast(
        nn.Linear, module.lora_B[adapter_name]
    )
