"""A LoRI adapter as a stock one: dense when saved, its trained entries alone when loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.reference import lora_linears
from ..layers.sparse_factor import SparseFactor
from .adapter_layers import lora_layers, module_name, weight_keys

_PREFIX = "base_model.model."


def sparse_factors(model: nn.Module, adapter_name: str) -> dict[str, SparseFactor]:
    """The sparse B of every layer that has one, by the layer's path in `model`."""
    found = {}
    for path, layer in lora_layers(model, adapter_name):
        factor = layer.lora_B[adapter_name] if adapter_name in layer.lora_B else None
        if isinstance(factor, SparseFactor):
            found[path] = factor
    return found


def densify(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Put the dense lora_B of stock LoRA in the place of the trained entries."""
    for path, factor in sparse_factors(model, adapter_name).items():
        values = tensors.pop(_values_key(path, adapter_name), None)
        # Processes other than the main one are given no tensors in sharded training.
        if values is not None:
            tensors[weight_keys(path, adapter_name)[1]] = factor.dense(values)


def renamed(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Saved tensors with lora_B under the name of the trained entries, by which PEFT finds them."""
    names = {}
    for path in sparse_factors(model, adapter_name):
        # A model without PeftModel around it has no prefix, the saved names have.
        for saved in (f"{path}.lora_B", f"{_PREFIX}{path}.lora_B"):
            names[f"{saved}.weight"] = f"{saved}.values"
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def sparsify(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Reduce the dense lora_B of a saved adapter to the trained entries, A and the rest checked.

    Raises:
        ValueError: if a lora_B is missing, or a saved A, or an entry off the mask, is another than
            this adapter's.
    """
    sparse = sparse_factors(model, adapter_name)
    for path, layer in lora_layers(model, adapter_name):
        name, key_A = module_name(path), weight_keys(path, adapter_name)[0]
        lora_A = lora_linears(layer, adapter_name)[0].weight
        if key_A in tensors and not is_same_projection(tensors[key_A], lora_A):
            raise ValueError(
                f"layer {name}: the saved adapter has another A than this model, which LoRI never "
                "changes; load it with the lori_seed that it was made with"
            )
        if path not in sparse:
            continue
        key = _values_key(path, adapter_name)
        if key not in tensors:
            raise ValueError(f"layer {name}: the saved adapter has no lora_B")
        try:
            tensors[key] = sparse[path].sparse(tensors[key])
        except ValueError as error:
            raise ValueError(
                f"layer {name}: {error}; load it with the lori_mask and lori_start that it was "
                "made with"
            ) from error


def _values_key(path: str, adapter_name: str) -> str:
    return f"{path}.lora_B.{adapter_name}.values"


def is_same_projection(saved: Tensor, drawn: Tensor) -> bool:
    """Whether a saved A is the drawn one, in the narrower of their dtypes."""
    if saved.shape != drawn.shape:
        return False
    narrow = min((saved.dtype, drawn.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(saved.to(narrow).cpu(), drawn.to(narrow).cpu())
