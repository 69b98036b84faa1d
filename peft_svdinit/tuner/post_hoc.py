"""Starting from factors an adapter that a model already has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftType
from torch import nn

from ..factors import IN_MEMORY, INITS_MOVING_BASE, FactorsFile, LowRankFactors, Split, Start
from ..files import WrongKind
from .config.lori import LoriConfig
from .config.stock_saved import lora_options
from .config.svd import Coverage, SvdLoraConfig
from .model import settle
from .svd_start import initialize_layers


def initialize_lora_from_factors(
    model: nn.Module,
    factors: str | os.PathLike | Mapping[str, LowRankFactors],
    *,
    adapter_name: str = "default",
    start: Start = "delta",
    split: Split = "output",
    coverage: Coverage = "strict",
    check_base: bool = True,
) -> None:
    """Start an existing LoRA adapter from factors, in place.

    Args:
        model: a PeftModel, or a transformers model with an adapter added.
        factors: a factors file, folder or Hub id, or factors by module name.
        adapter_name: the adapter to initialise.
        start, split, coverage, check_base: as `svd_start` and so on of `SvdLoraConfig`.

    Raises:
        ValueError, TypeError: as `SvdLoraConfig` and `initialize_layers` do, if the adapter's own
            initialisation moved the base weights, and if it is LoRI's or not LoRA's.
        RuntimeError: if the adapter is merged.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no adapter of that name")
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise WrongKind(
            f"adapter_name={adapter_name!r} was made with a {type(config).__name__}; only LoRA "
            "adapters start from factors: make it with a LoraConfig"
        )
    if isinstance(config, LoriConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is a LoRI adapter, whose A is the one that lori_seed "
            "draws and never changes; make it with a LoraConfig to start it from factors, or give "
            "the LoriConfig an adapter with the same A as lori_start"
        )
    previous = config.init_lora_weights
    if isinstance(previous, str) and previous.lower().startswith(INITS_MOVING_BASE):
        raise ValueError(
            f"adapter_name={adapter_name!r} was made with init_lora_weights={previous!r}, which "
            "moved the base weights; make the adapter with init_lora_weights=True first"
        )
    if isinstance(factors, FactorsFile):
        source = str(factors.path)
    else:
        source = IN_MEMORY if isinstance(factors, Mapping) else os.fspath(factors)
    new_config = SvdLoraConfig(
        **{**lora_options(config), "init_lora_weights": True},
        svd_factors=source,
        svd_start=start,
        svd_split=split,
        svd_coverage=coverage,
        svd_check_base=check_base,
    )
    initialize_layers(
        model,
        factors if isinstance(factors, Mapping) else FactorsFile(factors),
        adapter_name,
        new_config.initializer(),
        coverage=coverage,
        check_base=check_base,
    )
    configs[adapter_name] = new_config
    for module in (model, getattr(model, "base_model", None)):
        settle(module)
