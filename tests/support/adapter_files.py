"""Adapter files in the styles of kohya, LyCORIS and diffusers, and PEFT's LoHa and LoKr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny_models import tiny_model

RANK = 4
# Layer to the shape of its weight; the last three are convolutions of 3x3, 1x1 and 3.
LAYERS: dict[str, tuple[int, ...]] = {
    "lora_unet_down_blocks_0_attn1_to_q": (12, 9),
    "lora_te_text_model_fc1": (7, 20),
    "lora_unet_conv_in": (8, 5, 3, 3),
    "lora_unet_proj_in": (6, 10, 1, 1),
    "lora_unet_conv_temporal": (6, 7, 3),
}
METADATA = {
    "ss_network_dim": str(RANK),
    "ss_network_alpha": "2.0",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_base_model_version": "sd_v1",
    "sshs_model_hash": "0123",
}


def random_tensors(shapes: dict[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}


def kohya_lora(
    path: Path, *, alpha: float | None = 2.0, rank: int = RANK, seed: int = 0
) -> dict[str, Tensor]:
    """A LoRA file on `LAYERS`; its dense deltas by layer."""
    shapes = {}
    for name, (out, inputs, *kernel) in LAYERS.items():
        shapes[f"{name}.lora_down.weight"] = (rank, inputs, *kernel)
        shapes[f"{name}.lora_up.weight"] = (out, rank, *(1 for _ in kernel))
    tensors = random_tensors(shapes, seed=seed)
    if alpha is not None:
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in LAYERS}
    save_file(tensors, path, METADATA)
    return kohya_deltas(path)


def kohya_deltas(path: Path) -> dict[str, Tensor]:
    """Dense float64 deltas (out, in, *kernel) of a kohya file, from the definition."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    deltas = {}
    for key, up in tensors.items():
        if not key.endswith(".lora_up.weight"):
            continue
        name = key.removesuffix(".lora_up.weight")
        down = tensors[f"{name}.lora_down.weight"]
        alpha = tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0])))
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        deltas[name] = product * alpha / down.shape[0]
    return deltas


def lycoris_peft(folder: Path, config: LoHaConfig | LoKrConfig, *, seed: int = 0) -> PeftModel:
    """A PEFT LoHa or LoKr with random weights, saved."""
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model


def peft_deltas(model: Any) -> dict[str, Tensor]:
    """PEFT's own `get_delta_weight` of every adapted layer, in float64, by name in the base."""
    return {
        name.removeprefix("base_model.model."): module.double().get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
