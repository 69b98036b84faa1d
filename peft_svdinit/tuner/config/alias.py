"""Configurations that a string means, for tools that hand only a string through to PEFT."""

from __future__ import annotations

import os
from typing import Any

from peft import LoraConfig

from ...masks import load_mask
from .lori import LoriConfig
from .stock_saved import lora_options
from .svd import SvdLoraConfig

# Each before ":" and the path or Hub id of factors.
_SVD_PREFIXES: dict[str, dict[str, Any]] = {
    f"{SvdLoraConfig.init_marker}:": {},
    "svd_subspace:": {"svd_start": "subspace"},
    "svd_reference:": {"svd_start": "reference"},
}
_OF_WEIGHT = "svd_weight"
_LORI_PREFIX = f"{LoriConfig.init_marker}:"


def config_of_alias(config: LoraConfig) -> LoraConfig:
    """`config`, or what its `init_lora_weights` means.

    "svd_guided:<path-or-hub-id>" is a `SvdLoraConfig` of these factors, "svd_subspace:" and
    "svd_reference:" are the same with these as `svd_start`, and "svd_weight" begins at the
    principal part of the weights, as PiSSA, with the base untouched; "lori" is a `LoriConfig` with
    its defaults, and "lori:<path-or-hub-id>" one of this mask, its density and its seed.
    """
    alias = config.init_lora_weights
    if not isinstance(alias, str) or isinstance(config, (SvdLoraConfig, LoriConfig)):
        return config
    options = {**lora_options(config), "init_lora_weights": True}
    for prefix, start in _SVD_PREFIXES.items():
        if alias.startswith(prefix):
            path = os.path.expanduser(alias[len(prefix) :])
            return SvdLoraConfig(**options, **start, svd_factors=path)
    if alias == _OF_WEIGHT:
        return SvdLoraConfig(
            **options, svd_source="weight", svd_start="reference", svd_split="balanced"
        )
    if alias == LoriConfig.init_marker:
        return LoriConfig(**options)
    if alias.startswith(_LORI_PREFIX):
        path = os.path.expanduser(alias[len(_LORI_PREFIX) :])
        mask = load_mask(path, argument="init_lora_weights")
        return LoriConfig(**options, lori_mask=path, lori_density=mask.density, lori_seed=mask.seed)
    return config
