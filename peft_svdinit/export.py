"""Factors as a stock LoRA adapter that anybody loads with PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file

from .atomic import replacing
from .exact_pattern import exact_pattern
from .factors import LowRankFactors
from .initializers import Split, SvdGuided
from .linear_modules import linear_modules, model_skeleton


def export_adapter(
    factors: Mapping[str, LowRankFactors],
    rank: int,
    output_dir: str | os.PathLike,
    *,
    base_model_name_or_path: str | None = None,
    base: str | os.PathLike | None = None,
    split: Split = "output",
) -> Path:
    """Write the truncation of every delta to `rank` as a LoRA adapter with scaling 1 (alpha = r).

    Layers too small for `rank` get all they have, through `rank_pattern` and `alpha_pattern`.

    Args:
        factors: by module name.
        rank: triplets kept per layer.
        output_dir: new folder for `adapter_config.json` and `adapter_model.safetensors`.
        base_model_name_or_path: stored in the adapter's config.
        base: folder of the base model; with it target modules are listed by their last name part
            where that selects the same layers, as servers expect, else by full name.
        split: "output" or "balanced", see `SvdGuided`.

    Raises:
        ValueError: if a layer holds fewer triplets than `rank` although its delta has more.
    """
    initializer = SvdGuided("delta", split)
    tensors, ranks = {}, {}
    for name, layer in factors.items():
        ranks[name] = min(rank, *layer.shape)
        if ranks[name] > layer.rank:
            raise ValueError(
                f"rank={rank} is above the {layer.rank} triplets held for layer {name}; export a "
                "lower rank, or make factors of a higher one"
            )
        init = initializer(layer, rank=ranks[name], scaling=1.0)
        tensors[f"base_model.model.{name}.lora_A.weight"] = init.lora_A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = init.lora_B.contiguous()
    smaller = exact_pattern({name: own for name, own in ranks.items() if own != rank})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(smaller),
        alpha_pattern=dict(smaller),
        target_modules=_target_modules(list(factors), base),
        base_model_name_or_path=base_model_name_or_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    target = Path(output_dir)
    with replacing(target) as temporary:
        config.save_pretrained(os.fspath(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def _target_modules(names: list[str], base: str | os.PathLike | None) -> list[str]:
    endings = sorted({name.rpartition(".")[2] for name in names})
    if base is not None and set(linear_modules(model_skeleton(base), endings)) == set(names):
        return endings
    return names
