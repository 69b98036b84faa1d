"""The LoRA layers that PEFT makes, and what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..models import PREFIX, unwrapped
from .layers.parts import lora_linears


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Names and LoRA layers that carry the adapter, whatever the kind of layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
        ):
            yield name, module


def module_name(name: str) -> str:
    """A module's name in the base model, whether that was wrapped or compiled or not."""
    return unwrapped(name.removeprefix(PREFIX))


def is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    lora_A = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
    return isinstance(lora_A, nn.Linear) and not isinstance(layer, ParamWrapper)


def refuse_added_to_shards(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Raise if the base was split by `fully_shard` before it got the adapter.

    FSDP2 reduces the gradients of what it has split, so that those of A and B would stay each
    process's own, in silence.

    Raises:
        RuntimeError: naming the layer.
    """
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if isinstance(weight, DTensor) and not all(
            isinstance(part.weight, DTensor) for part in lora_linears(layer, adapter_name)
        ):
            raise RuntimeError(
                f"layer {name}: its base weight was split by fully_shard before adapter "
                f"{adapter_name!r} was made, whose gradients no process would share; make the "
                "adapter first, then call fully_shard"
            )


def given_memory(module: nn.Linear | DoraLinearLayer, layer: LoraLayer) -> bool:
    """Whether the adapter's module was on the meta device (low_cpu_mem_usage) and no longer is."""
    if not module.weight.is_meta:
        return False
    base_weight = getattr(layer.get_base_layer(), "weight", None)
    if base_weight is None or base_weight.is_meta:
        module.to_empty(device="cpu")
    else:
        module.to_empty(device=base_weight.device)
    return True


def weight_keys(name: str, adapter_name: str) -> list[str]:
    return [f"{name}.lora_{part}.{adapter_name}.weight" for part in "AB"]


def adapter_dtypes(model: nn.Module, adapter_name: str) -> set[torch.dtype]:
    return {
        lora_linears(layer, adapter_name)[0].weight.dtype
        for _, layer in lora_layers(model, adapter_name)
        if adapter_name in layer.lora_A
    }


def lora_scalings(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """The factor before B A of every LoRA layer that carries the adapter, by module name."""
    return {
        module_name(name): layer.scaling[adapter_name]
        for name, layer in lora_layers(model, adapter_name)
    }


def shortened(names: list[str]) -> str:
    listed = ", ".join(names[:5]) or "none"
    return f"{listed}, …" if len(names) > 5 else listed
