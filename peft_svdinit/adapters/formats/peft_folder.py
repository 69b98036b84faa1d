"""PEFT folders: LoRA, and LoHa and LoKr to be turned into LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...factors import LoraAdapter
from ...files import TensorFile, read_together, resolve_file
from ...models import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    PatternValues,
    adapted_module,
    read_adapter_config,
    refuse_endless_patterns,
    spelled_in_peft,
    unwrapped_config,
    unwrapped_keys,
)
from .beside import Beside
from .key_styles import LYCORIS_PARTS
from .lora import DOWN, UP
from .stored import StoredAdapter, StoredLayer, algorithm_of

_PART_OF = {".lora_A.weight": DOWN, ".lora_B.weight": UP} | {f".{p}": p for p in LYCORIS_PARTS}
# Of the configuration: which layers are adapted, of which model.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
_LORA_ONLY = ("fan_in_fan_out", "lora_dropout")
_BIASES = ("none", "lora_only", "all")


def read_peft_folder(folder: Path) -> StoredAdapter:
    """Open a saved PEFT adapter of type LORA, LOHA or LOKR; names are without torch's wrappers.

    The scaling is alpha / r, with the patterns of both, and with rslora where a LoRA uses it. All
    that is no factor is `beside`: PEFT puts it in the place of the base's tensors, except biases
    of lora_B, which it adds, and magnitudes of DoRA.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is of another type, stores a pickle, is truncated, or has a layer that
            is no linear one with a factored delta.
    """
    with read_together(folder / CONFIG_NAME, "adapter"):
        config = read_adapter_config(folder / CONFIG_NAME, "adapter")
        lycoris = config.get("peft_type") in ("LOHA", "LOKR")
        return _lycoris(folder, config) if lycoris else _lora(folder)


def _lora(folder: Path) -> StoredAdapter:
    lora = LoraAdapter(folder, with_beside=True)  # Which refuses other layers.
    file = TensorFile(folder / WEIGHTS_NAME)
    scalings = {name: lora.scaling_of(name) for name in lora}
    beside = {name: _beside(name, key, scalings) for name, key in lora.beside.items()}
    return _adapter(file, unwrapped_keys(file.shapes), lora.config, scalings, beside)


def _beside(name: str, key: str, scalings: Mapping[str, float]) -> Beside:
    layer = name.removesuffix(".lora_B.bias")
    if layer in scalings:
        return Beside(key, "difference", layer, scalings[layer])
    if name.endswith(".lora_magnitude_vector"):
        return Beside(key, "magnitude")
    return Beside(key, "whole")


def _lycoris(folder: Path, config: Mapping[str, Any]) -> StoredAdapter:
    path = resolve_file(folder, WEIGHTS_NAME, argument="adapter")
    file = TensorFile(path)
    stored = unwrapped_keys(file.shapes, f"adapter: {path}")
    names = {adapted_module(key) for pair in stored.items() for key in pair}
    refuse_endless_patterns(config, names, f"adapter: {folder / CONFIG_NAME}: ")
    patterns = [PatternValues(config.get(one)) for one in ("rank_pattern", "alpha_pattern")]
    scalings, ranks, beside = {}, {}, {}
    for key, at in stored.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        if key.startswith(PREFIX) and not part.startswith(("hada_", "lokr_")):
            beside[key.removeprefix(PREFIX)] = Beside(at, "whole")
            continue
        if not key.startswith(PREFIX) or part not in LYCORIS_PARTS:
            raise ValueError(
                f"adapter: {path} holds {key}, which is no part of a LoHa or LoKr of a linear "
                "layer; of PEFT folders only linear layers are supported"
            )
        spelled = spelled_in_peft(at).rpartition(".")[0]
        ranks[name], alpha = (
            value(name, config[usual], spelled=spelled)
            for value, usual in zip(patterns, ("r", "alpha"), strict=True)
        )
        scalings[name] = alpha / ranks[name]
    if not scalings:
        raise ValueError(f"adapter: {path} holds no layer")
    if any(key != at for key, at in stored.items()):
        config = unwrapped_config(config, scalings, {})
    adapter = _adapter(file, stored, config, scalings, beside)
    for name, layer in adapter.layers.items():
        if layer.header.kernel:
            raise ValueError(
                f"adapter: layer {name} in {path} is a convolution; of PEFT folders only linear "
                "layers are supported"
            )
        if layer.header.dim not in (None, ranks[name]):
            raise ValueError(
                f"adapter: layer {name} in {path} has rank {layer.header.dim}, but {CONFIG_NAME} "
                f"says {ranks[name]}: not the configuration of these weights?"
            )
    return adapter


def _adapter(
    file: TensorFile,
    stored: Mapping[str, str],
    config: Mapping[str, Any],
    scalings: Mapping[str, float],
    beside: Mapping[str, Beside],
) -> StoredAdapter:
    layers = {}
    for name, scaling in scalings.items():
        keys = {part: f"{PREFIX}{name}{end}" for end, part in _PART_OF.items()}
        keys = {part: stored[key] for part, key in keys.items() if key in stored}
        algorithm, header = algorithm_of(name, keys, file)
        layers[name] = StoredLayer(algorithm, header, keys, scaling)
    return StoredAdapter(file, None, layers, config, beside)


def refuse_unselected(path: str, adapter: StoredAdapter) -> None:
    """Raise ValueError if a layer is none that the adapter's configuration selects.

    PEFT passes over the tensors of such a layer as it loads the adapter.
    """
    # Only here: importing it takes seconds, and files need none of it.
    from peft.tuners.tuners_utils import check_target_module_exists

    selection = SimpleNamespace(**{key: adapter.config.get(key) for key in _SELECTION})
    if selection.target_modules in (None, "all-linear"):
        return  # Which depends on the model.
    if not isinstance(selection.target_modules, str):
        # PEFT looks for a layer among these first.
        selection.target_modules = set(selection.target_modules)
    for name in adapter.layers:
        if not check_target_module_exists(selection, name):
            raise ValueError(
                f"adapter: {path} stores layer {name}, which {CONFIG_NAME} does not select "
                f"({', '.join(key for key in _SELECTION if adapter.config.get(key))}), so that "
                "PEFT does not load it; correct the configuration, or delete the layer's tensors"
            )


def carried_over(adapters: Sequence[StoredAdapter], names: Collection[str]) -> dict[str, Any]:
    """Options of the configuration of a LoRA of these layers that is made of PEFT folders.

    The selection of layers stays as the adapters' configurations have it if they agree; else the
    layers are listed by name. Options of the tensors beside the factors go along.

    Raises:
        ValueError: if the adapters train other tokens, or an option is unknown to PEFT.
    """
    configs = [adapter.config for adapter in adapters]
    first = configs[0]
    kept = {key: first[key] for key in _KEPT if key in first}
    kept |= {key: first[key] for key in _LORA_ONLY if first["peft_type"] == "LORA" and key in first}

    kept |= _for_beside(configs)

    def chosen(config: Mapping[str, Any], key: str) -> Any:
        value = config.get(key)
        return sorted(value) if isinstance(value, list) else value

    same = all(chosen(c, key) == chosen(first, key) for c in configs for key in _SELECTION)
    if same:
        return kept | {key: first[key] for key in _SELECTION if first.get(key) is not None}
    return kept | {"target_modules": list(names)}


def _for_beside(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options without which PEFT does not load what lies beside the factors."""
    tokens = [config.get("trainable_token_indices") for config in configs]
    if any(one != tokens[0] for one in tokens):
        raise ValueError(
            "adapters: their trainable_token_indices differ, so that their embeddings are of other "
            "tokens; train them with the same ones"
        )
    modules = [module for config in configs for module in config.get("modules_to_save") or ()]
    options = {
        "modules_to_save": list(dict.fromkeys(modules)),
        "trainable_token_indices": tokens[0],
        "ensure_weight_tying": any(config.get("ensure_weight_tying") for config in configs),
        "use_dora": any(config.get("use_dora") for config in configs),
        "lora_bias": any(config.get("lora_bias") for config in configs),
    }
    biases = [config.get("bias", "none") for config in configs]
    for bias in biases:
        if bias not in _BIASES:
            raise ValueError(f"adapters: bias must be one of {', '.join(_BIASES)}, got {bias!r}")
    options["bias"] = max(biases, key=_BIASES.index)
    return {option: value for option, value in options.items() if value}
