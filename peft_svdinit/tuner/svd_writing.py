"""What a start leaves in a LoRA layer: of factors, without factors, or for saved weights."""

from __future__ import annotations

from itertools import chain

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..factors import LoraInit, Start
from ..models import gathered, overwrite_, whole_shape
from .adapter_layers import given_memory, is_linear, lora_layers, module_name
from .layers.parts import lora_linears
from .layers.reference import (
    ReferenceVariant,
    attach_reference,
    attach_zero_reference,
    detach_reference,
    reference_of,
)
from .magnitudes import refresh_magnitude
from .svd_checks import check_can_subtract


@torch.no_grad()
def write_start(layer: LoraLayer, adapter_name: str, init: LoraInit) -> None:
    values = (init.lora_A, init.lora_B)
    for module, value in zip(lora_linears(layer, adapter_name), values, strict=True):
        if given_memory(module, layer) and module.bias is not None:
            module.bias.zero_()
        overwrite_(module.weight, value)
    if init.subtract_initial:
        attach_reference(layer, adapter_name)
    elif isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant):
        detach_reference(layer, adapter_name)
    if adapter_name in layer.lora_magnitude_vector:
        refresh_magnitude(layer, adapter_name)


@torch.no_grad()
def start_without_factors(layer: LoraLayer, adapter_name: str, start: Start) -> None:
    if not is_linear(layer, adapter_name):
        return
    parts = lora_linears(layer, adapter_name)
    given = [given_memory(part, layer) for part in parts]
    subtracts = isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant)
    # A and B that mean the difference to a reference mean nothing without it.
    if any(given) or (subtracts and reference_of(layer, adapter_name)[1].any()):
        with gathered(chain.from_iterable(part.parameters() for part in parts), written=True):
            layer.reset_lora_parameters(adapter_name, True)
    if adapter_name in layer.lora_magnitude_vector:
        refresh_magnitude(layer, adapter_name)
    if start == "reference":
        attach_zero_reference(layer, adapter_name)
    elif subtracts:
        detach_reference(layer, adapter_name)


@torch.no_grad()
def leave_to_saved_weights(model: nn.Module, adapter_name: str, start: Start) -> None:
    """Make every layer what the saved one was, without numbers: what is not loaded is no number."""
    for name, layer in lora_layers(model, adapter_name):
        if start == "reference":
            check_can_subtract(module_name(name), layer, adapter_name)
        if not is_linear(layer, adapter_name):
            continue
        for part in lora_linears(layer, adapter_name):
            given_memory(part, layer)
            overwrite_(part.weight, torch.full(whole_shape(part.weight), torch.nan))
        if start == "reference":
            attach_reference(layer, adapter_name)
        if adapter_name in layer.lora_magnitude_vector:
            refresh_magnitude(layer, adapter_name)
