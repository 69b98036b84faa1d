"""Merging by PEFT's `add_weighted_adapter`, one layer at a time and without a base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import nn

from ...models import layer_seed
from ..rounding import Factors
from .methods import MergeMethod
from .terms import LoraTerm

_LAYER, _ELSEWHERE, _MERGED = "layer", "elsewhere", "merged"


def merged_by_peft(
    name: str, terms: Sequence[LoraTerm], weights: Sequence[float], method: MergeMethod
) -> Factors:
    """What PEFT would make of layer `name` in a model with all adapters.

    The base is a linear layer of the terms' shape whose weight takes no memory. PEFT's own LoRA
    tuner works on it, and the global random state stays as it is.

    Args:
        terms: of the adapters that have the layer.
        weights: of all adapters, in their order.
        method: one that goes through PEFT.

    Raises:
        ValueError: if the method needs equal ranks and they differ.
    """
    ranks = [term.delta.lora_A.shape[0] for term in terms]
    if not method.truncates and len(set(ranks)) > 1:
        raise ValueError(
            f"method {method.name} adds up the A and the B of the adapters, whose ranks here are "
            f"{', '.join(map(str, ranks))}; use cat or svd, which take any"
        )
    by_adapter = {term.adapter: term for term in terms}
    names = [str(index) for index in range(len(weights))]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        # PEFT: "no pruning will be performed", which a density of 1 asks for.
        warnings.filterwarnings("ignore", message="The density", category=UserWarning)
        tuner = _tuner(by_adapter, len(weights), terms[0].delta.shape)
        layer: Any = tuner.model[_LAYER]
        for index, term in by_adapter.items():
            layer.lora_A[names[index]].weight.data = term.delta.lora_A
            layer.lora_B[names[index]].weight.data = term.delta.lora_B
            layer.scaling[names[index]] = term.delta.scaling
        # Not torch.manual_seed, which seeds the generators of all devices.
        torch.default_generator.manual_seed(layer_seed(method.seed or 0, name))
        tuner.add_weighted_adapter(
            names,
            list(weights),
            _MERGED,
            combination_type=method.name,  # pyright: ignore[reportArgumentType]
            svd_rank=method.rank,
            svd_full_matrices=False,
            density=method.density,
            majority_sign_method=method.majority_sign_method or "total",
        )
        lora_A, lora_B = layer.lora_A[_MERGED].weight.data, layer.lora_B[_MERGED].weight.data
    return lora_A.clone(), lora_B.clone()


def _tuner(by_adapter: dict[int, LoraTerm], count: int, shape: tuple[int, int]) -> LoraModel:
    """All adapters on a model of two layers, of which some lack the one that is merged.

    Those target the other alone: PEFT treats one adapter by itself as "linear" whatever the method,
    and another way in a model where it is the only one on this layer.
    """
    out_features, in_features = shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    base = nn.ModuleDict({_LAYER: layer, _ELSEWHERE: nn.Linear(1, 1, bias=False)})
    usual = next(iter(by_adapter.values())).delta.lora_A.shape[0]
    configs = {}
    for index in range(count):
        term = by_adapter.get(index)
        rank = term.delta.lora_A.shape[0] if term else usual
        targets = [_LAYER, _ELSEWHERE] if term else [_ELSEWHERE]
        configs[str(index)] = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    tuner = LoraModel(base, configs["0"], "0")
    for name, config in configs.items():
        if name != "0":
            tuner.peft_config[name] = config
            tuner.inject_adapter(tuner.model, name)
    return tuner
