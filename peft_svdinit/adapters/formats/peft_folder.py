"""PEFT folders: LoRA, and LoHa and LoKr to be turned into LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ...factors import LoraAdapter
from ...files import TensorFile, read_json, refuse_pickle
from ...models import CONFIG_NAME, PREFIX, WEIGHTS_NAME, exact_pattern, lora_key, pattern_value
from .key_styles import LYCORIS_PARTS, refuse_unsupported
from .lora import DOWN, UP
from .stored import StoredAdapter, StoredLayer, algorithm_of

# Of the configuration: which layers are adapted, of which model.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
_LORA_ONLY = ("fan_in_fan_out", "lora_dropout")


def read_peft_folder(folder: Path) -> StoredAdapter:
    """Open a saved PEFT adapter of type LORA, LOHA or LOKR.

    The scaling is alpha / r, with the patterns of both, and with rslora where a LoRA uses it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is of another type, stores a pickle, is truncated, or does more than add
            a factored delta to linear layers.
    """
    config = read_json(folder / CONFIG_NAME, "adapter")
    if config.get("peft_type") not in ("LOHA", "LOKR"):
        return _lora(LoraAdapter(folder))
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        refuse_pickle(path.with_suffix(".bin"), "adapter")
    if config.get("modules_to_save"):
        raise ValueError(
            f"adapter: {folder} uses modules_to_save, which factored deltas do not express; merge "
            "it and extract the delta of the merged checkpoint instead"
        )
    file = TensorFile(path)
    refuse_unsupported(file.shapes, path)
    groups: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or part not in LYCORIS_PARTS:
            raise ValueError(f"adapter: {path} holds {key}, which is no part of a LoHa or LoKr")
        groups.setdefault(name, {})[part] = key
    if not groups:
        raise ValueError(f"adapter: {path} holds no layer")
    layers = {}
    for name, keys in groups.items():
        algorithm, header = algorithm_of(name, keys, file)
        if header.kernel:
            raise ValueError(
                f"adapter: layer {name} in {path} is a convolution; of PEFT folders only linear "
                "layers are supported"
            )
        rank, alpha = (_of_layer(config, name, key) for key in ("r", "alpha"))
        if header.dim not in (None, rank):
            raise ValueError(
                f"adapter: layer {name} in {path} has rank {header.dim}, but {CONFIG_NAME} says "
                f"{rank}: not the configuration of these weights?"
            )
        layers[name] = StoredLayer(algorithm, header, keys, alpha / rank)
    return StoredAdapter(file, None, layers, config)


def _of_layer(config: Mapping[str, Any], name: str, key: str) -> Any:
    pattern = config.get("rank_pattern" if key == "r" else "alpha_pattern")
    return pattern_value(pattern, name, config[key])


def _lora(adapter: LoraAdapter) -> StoredAdapter:
    file = TensorFile(adapter.folder / WEIGHTS_NAME)
    layers = {}
    for name in adapter:
        keys = {
            DOWN: lora_key(name, "A"),
            UP: lora_key(name, "B"),
        }
        algorithm, header = algorithm_of(name, keys, file)
        layers[name] = StoredLayer(algorithm, header, keys, adapter.scaling_of(name))
    return StoredAdapter(file, None, layers, adapter.config)


def write_peft_folder(
    adapters: Sequence[StoredAdapter],
    folder: Path,
    weights: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Write (lora_A, lora_B) by layer as a stock LoRA of scaling 1 (alpha = r) to a new folder.

    The selection of layers stays as the adapters' configurations have it if they agree; else the
    layers are listed by name.
    """
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in weights.items()}
    common = max(ranks.values(), key=list(ranks.values()).count)
    deviating = exact_pattern({name: rank for name, rank in ranks.items() if rank != common})
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=dict(deviating),
        alpha_pattern=dict(deviating),
        inference_mode=True,
        **_carried_over(adapters, list(weights)),
    )
    tensors = {}
    for name, (lora_A, lora_B) in weights.items():
        tensors[lora_key(name, "A")] = lora_A
        tensors[lora_key(name, "B")] = lora_B
    config.save_pretrained(os.fspath(folder))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _carried_over(adapters: Sequence[StoredAdapter], names: list[str]) -> dict[str, Any]:
    configs = [adapter.config for adapter in adapters]
    first = configs[0]
    kept = {key: first[key] for key in _KEPT if key in first}
    kept |= {key: first[key] for key in _LORA_ONLY if first["peft_type"] == "LORA" and key in first}

    def chosen(config: Mapping[str, Any], key: str) -> Any:
        value = config.get(key)
        return sorted(value) if isinstance(value, list) else value

    same = all(chosen(c, key) == chosen(first, key) for c in configs for key in _SELECTION)
    if same:
        return kept | {key: first[key] for key in _SELECTION if first.get(key) is not None}
    return kept | {"target_modules": names}
