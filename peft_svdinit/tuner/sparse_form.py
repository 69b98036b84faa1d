"""A LoRI adapter as a stock one: dense when saved, its trained entries alone when loaded."""

from __future__ import annotations

from torch import Tensor, nn

from ..masks import is_same_projection, random_projection
from ..models import PREFIX
from .adapter_layers import lora_layers, module_name, weight_keys
from .layers.parts import lora_linears
from .layers.sparse_factor import SparseFactor


def sparse_factors(model: nn.Module, adapter_name: str) -> dict[str, SparseFactor]:
    """The sparse B of every layer that has one, by the layer's path in `model`."""
    found = {}
    for path, layer in lora_layers(model, adapter_name):
        factor = layer.lora_B[adapter_name] if adapter_name in layer.lora_B else None
        if isinstance(factor, SparseFactor):
            found[path] = factor
    return found


def densify(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Put the dense lora_B of stock LoRA in the place of the trained entries.

    Raises:
        ValueError: if the entries at hand are one process's share of them.
    """
    for path, factor in sparse_factors(model, adapter_name).items():
        tensors.pop(f"{_factor_key(path, adapter_name)}._extra_state", None)
        values = tensors.pop(_values_key(path, adapter_name), None)
        # Processes other than the main one are given no tensors in sharded training.
        if values is not None:
            if hasattr(values, "full_tensor") or values.shape != factor.indices.shape:
                raise ValueError(
                    f"layer {module_name(path)}: its values are sharded between processes; save "
                    "with state_dict=get_model_state_dict(model, options=StateDictOptions("
                    "full_state_dict=True)), or accelerator.get_state_dict(model)"
                )
            tensors[weight_keys(path, adapter_name)[1]] = factor.dense(values)


def restore_projections(
    tensors: dict[str, Tensor], model: nn.Module, adapter_name: str, seed: int
) -> None:
    """Draw every A whose B is saved without it: under ZeRO-3 the Trainer saves what is trained."""
    for path, layer in lora_layers(model, adapter_name):
        key_A, key_B = weight_keys(path, adapter_name)
        if key_B in tensors and key_A not in tensors:
            lora_A = random_projection(
                module_name(path), layer.r[adapter_name], layer.in_features or 0, seed
            )
            tensors[key_A] = lora_A.to(lora_linears(layer, adapter_name)[0].weight.dtype)


def renamed(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Saved tensors with lora_B under the name of the trained entries, by which PEFT finds them."""
    names = {}
    for path in sparse_factors(model, adapter_name):
        # A model without PeftModel around it has no prefix, the saved names have.
        for saved in (f"{path}.lora_B", f"{PREFIX}{path}.lora_B"):
            names[f"{saved}.weight"] = f"{saved}.values"
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def sparsify(tensors: dict[str, Tensor], model: nn.Module, adapter_name: str, seed: int) -> None:
    """Reduce the dense lora_B of a saved adapter to the trained entries, A and the rest checked.

    Args:
        tensors: of the saved adapter, under the names of the model; changed in place.
        model: with the adapter.
        adapter_name: the adapter.
        seed: of its A.

    Raises:
        ValueError: if an A or B is missing, or a saved A, or an entry off the mask, is another than
            this adapter's.
    """
    sparse = sparse_factors(model, adapter_name)
    for path, layer in lora_layers(model, adapter_name):
        name, (key_A, key_B) = module_name(path), weight_keys(path, adapter_name)
        if path in sparse:
            key_B = _values_key(path, adapter_name)
        for part, key in (("lora_A", key_A), ("lora_B", key_B)):
            if key not in tensors:
                raise ValueError(f"layer {name}: the saved adapter has no {part}")
        lora_A = random_projection(name, layer.r[adapter_name], layer.in_features or 0, seed)
        if not is_same_projection(tensors[key_A], lora_A):
            raise ValueError(
                f"layer {name}: the saved adapter has another A than this model, which LoRI never "
                "changes; load it with the lori_seed and r that it was made with"
            )
        if path not in sparse:
            continue
        try:
            tensors[key_B] = sparse[path].sparse(tensors[key_B])
        except ValueError as error:
            raise ValueError(
                f"layer {name}: {error}; load it with the lori_mask and lori_start that it was "
                "made with"
            ) from error
        tensors[f"{_factor_key(path, adapter_name)}._extra_state"] = sparse[path].get_extra_state()


def _factor_key(path: str, adapter_name: str) -> str:
    return f"{path}.lora_B.{adapter_name}"


def _values_key(path: str, adapter_name: str) -> str:
    return f"{_factor_key(path, adapter_name)}.values"
