"""An adapter that subtracts its start as a stock one: stacked when saved, unstacked when loaded."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .adapter_layers import lora_layers, weight_keys
from .layers.reference import ReferenceVariant, reference_of


def references(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    return {
        name: layer
        for name, layer in lora_layers(model, adapter_name)
        if isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant)
    }


def unstack(
    tensors: dict[str, Tensor], name: str, layer: LoraLayer, adapter_name: str, *, checked: bool
) -> None:
    """Turn the saved [A ; A₀] and [B | −B₀] of a layer into A and B.

    A₀ and B₀ must be those of the layer if `checked` and the layer has some, and replace them in
    any case: the trained A and B are relative to what was saved, to the last bit.
    """
    keys = weight_keys(name, adapter_name)
    if not tensors.keys() >= set(keys):
        return  # PEFT reports what a file lacks.
    stacked_A, stacked_B = (tensors[key] for key in keys)
    reference_A, reference_B = reference_of(layer, adapter_name)
    rank = layer.r[adapter_name]
    if stacked_A.shape[0] != 2 * rank:
        raise ValueError(
            f'layer {name}: a saved svd_start="reference" adapter of rank {rank} has {2 * rank} '
            f"rows in lora_A, this one has {stacked_A.shape[0]}"
        )
    saved = (stacked_A[rank:].to(reference_A), -stacked_B[:, rank:].to(reference_B))
    awaited = bool(reference_B.isnan().any())
    if checked and not awaited and not all(map(torch.allclose, saved, (reference_A, reference_B))):
        raise ValueError(
            f"layer {name}: the saved adapter started from other factors than svd_factors of this "
            "model; resume with the factors it was trained with"
        )
    reference_A.copy_(saved[0])
    reference_B.copy_(saved[1])
    tensors[keys[0]], tensors[keys[1]] = stacked_A[:rank].clone(), stacked_B[:, :rank].clone()
