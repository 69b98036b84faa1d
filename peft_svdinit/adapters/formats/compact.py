"""A LoRI adapter as a file of its trained entries, and back as the stock LoRA it stands for.

A is drawn again from its seed, and its hash compared: it takes no room.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...factors import SIDECAR_NAME, LoraAdapter, LoraInit, product_alone, read_sidecar
from ...files import WrongKind, write_json
from ...masks import (
    MASK_FILE_NAME,
    CompactAdapter,
    LoriMask,
    MaskedLayer,
    is_same_projection,
    load_mask,
    random_projection,
    save_compact,
    tensor_hash,
)
from ..dtypes import Dtype, torch_dtype
from ..output_folder import EXPORT_REPORT, OutputFolder
from ..rounding import stored
from ..stock_lora import LoraShape, stock_lora, write_layer


def compact_adapter_folder(
    adapter: str | os.PathLike, path: str | os.PathLike, *, dtype: Dtype = "bfloat16"
) -> Path:
    """Write a saved LoRI adapter, a checkpoint's for one, as bits and values.

    What it stores beside the layers, modules saved whole for one, is left out with a warning.

    Raises:
        FileNotFoundError: if a file is missing, the mask among them.
        ValueError: if it is no LoRA whose effect is scaling * B @ A alone, A or B do not fit the
            mask, or a value is beyond `dtype`.
    """
    narrow = torch_dtype(dtype)
    saved = LoraAdapter(adapter)
    if not (saved.folder / SIDECAR_NAME).is_file() or not (saved.folder / MASK_FILE_NAME).is_file():
        raise FileNotFoundError(
            f"adapter: {saved.folder} has no {SIDECAR_NAME} with {MASK_FILE_NAME}: it was not "
            "saved from a sparse LoriConfig, and other adapters have no compact form"
        )
    read_sidecar(saved.folder / SIDECAR_NAME, "adapter")
    mask = load_mask(saved.folder, argument="adapter")
    other = set(saved) ^ set(mask.layers)
    if other:
        raise ValueError(f"adapter: layer {min(other)} is in the adapter or in its mask alone")
    dense = {}
    for name, layer in mask.layers.items():
        product = saved[name]
        if not is_same_projection(product.lora_A, _projection(name, layer, mask.seed)):
            raise ValueError(
                f"adapter: layer {name} of {saved.folder} has another A than seed {mask.seed} of "
                "its mask draws; a LoRI adapter never changes A"
            )
        if product.lora_B.shape != layer.mask.shape:
            raise ValueError(
                f"adapter: lora_B of layer {name} is of shape {tuple(product.lora_B.shape)}, its "
                f"mask of {tuple(layer.mask.shape)}"
            )
        dense[name] = product.lora_B
    return _write(path, mask, dense, product_alone(saved.config), narrow)


def write_stock_adapter(
    compact: CompactAdapter, folder: str | os.PathLike, *, dtype: Dtype = "float32"
) -> Path:
    """Write the stock LoRA folder that a compact adapter stands for, atomically.

    Args:
        compact: as `load_compact` reads it.
        folder: see `OutputFolder`.
        dtype: of A and B.

    Raises:
        ValueError: if an A drawn here is another than the one it was trained with, `folder` holds
            other files, a compact adapter for one, or the configuration is not that of these
            layers.
    """
    narrow = torch_dtype(dtype)
    output = OutputFolder.checked(folder, "output_dir")
    layers = compact.mask.layers
    shapes = {
        name: LoraShape(layer.rank, (layer.mask.shape[0], layer.in_features), narrow)
        for name, layer in layers.items()
    }
    with output.replacing() as temporary:
        with stock_lora(temporary, compact.config, shapes) as writer:
            for name, layer in layers.items():
                lora_B = torch.zeros(layer.mask.shape)
                lora_B[layer.mask] = compact.values[name].float()
                init = LoraInit(_projection(name, layer, compact.mask.seed), lora_B, False)
                write_layer(writer, name, stored(name, init, narrow)[0])
        _refuse_unless_product(temporary)
        write_json(
            temporary / EXPORT_REPORT,
            {"compact": {"layers": len(layers), "seed": compact.mask.seed}},
        )
    return output.path


def _refuse_unless_product(folder: Path) -> None:
    """Raise ValueError if the configuration, read from a file, is not that of these weights."""
    try:
        LoraAdapter(folder)
    except (ValueError, WrongKind) as error:
        raise ValueError(
            f"adapter: the adapter_config.json in the compact file does not fit its entries "
            f"({error}); write the file again"
        ) from error


def _projection(name: str, layer: MaskedLayer, seed: int) -> Tensor:
    lora_A = random_projection(name, layer.rank, layer.in_features, seed)
    if tensor_hash(lora_A) != layer.hash_A:
        raise ValueError(
            f"layer {name}: seed {seed} draws another A here than the adapter was trained with; "
            "its mask is damaged, or was made by another version of peft-svdinit"
        )
    return lora_A


def _write(
    path: str | os.PathLike,
    mask: LoriMask,
    dense: dict[str, Tensor],
    config: dict[str, Any],
    dtype: torch.dtype,
) -> Path:
    # PEFT writes sets in any order; the same adapter is to give the same bytes.
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), (set, list)):
            config[key] = sorted(config[key])
    layers, values = {}, {}
    for name, layer in mask.layers.items():
        lora_B = dense[name].detach().cpu()
        # What an adapter started from may lie off the mask, and belongs to it.
        kept = layer.mask | (lora_B != 0)
        layers[name] = MaskedLayer(kept, layer.in_features, layer.hash_A)
        values[name] = lora_B[kept].to(dtype)
        if not torch.isfinite(values[name]).all():
            raise ValueError(f"layer {name}: lora_B has entries that {dtype} cannot hold")
    base = config.get("base_model_name_or_path")
    kept = replace(mask, layers=layers, base_model_name_or_path=base)
    return save_compact(path, CompactAdapter(kept, values, config))
