"""Configurations that a string means, for tools that hand only a string through to PEFT."""

from __future__ import annotations

import os

from peft import LoraConfig

from ...masks import load_mask
from .lori import LoriConfig
from .stock_saved import lora_options
from .svd import SvdLoraConfig

_SVD_PREFIX = f"{SvdLoraConfig.init_marker}:"
_LORI_PREFIX = f"{LoriConfig.init_marker}:"


def config_of_alias(config: LoraConfig) -> LoraConfig:
    """`config`, or what its `init_lora_weights` means.

    "svd_guided:<path-or-hub-id>" is a `SvdLoraConfig` of these factors; "lori" a `LoriConfig` with
    its defaults, and "lori:<path-or-hub-id>" one of this mask, its density and its seed.
    """
    alias = config.init_lora_weights
    if not isinstance(alias, str) or isinstance(config, (SvdLoraConfig, LoriConfig)):
        return config
    options = {**lora_options(config), "init_lora_weights": True}
    if alias.startswith(_SVD_PREFIX):
        return SvdLoraConfig(**options, svd_factors=os.path.expanduser(alias[len(_SVD_PREFIX) :]))
    if alias == LoriConfig.init_marker:
        return LoriConfig(**options)
    if alias.startswith(_LORI_PREFIX):
        path = os.path.expanduser(alias[len(_LORI_PREFIX) :])
        mask = load_mask(path, argument="init_lora_weights")
        return LoriConfig(**options, lori_mask=path, lori_density=mask.density, lori_seed=mask.seed)
    return config
