"""DoRA's magnitudes, which belong to what A and B begin as."""

from __future__ import annotations

from itertools import chain
from typing import cast

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer

from ..models import dequantised_weight, gathered, overwrite_, whole
from .adapter_layers import given_memory
from .layers.parts import lora_linears


def refresh_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """Set DoRA's magnitudes to the norms of base + update, in place: an optimizer may hold them."""
    magnitude = cast(DoraLinearLayer, layer.lora_magnitude_vector[adapter_name])
    lora_A, lora_B = lora_linears(layer, adapter_name)
    base_layer = layer.get_base_layer()
    given_memory(magnitude, layer)
    read = [part.parameters() for part in (lora_A, lora_B, base_layer)]
    with gathered(chain.from_iterable(read)):
        weight = dequantised_weight(base_layer).to(lora_A.weight.device)
        product = whole(lora_B.weight) @ whole(lora_A.weight)
        norm = magnitude.get_weight_norm(weight, product, layer.scaling[adapter_name])
    overwrite_(magnitude.weight, norm)
