"""Configurations that a string means, for tools that hand only a string through to PEFT."""

from __future__ import annotations

import os

from peft import LoraConfig

from .stock_saved import lora_options
from .svd import SvdLoraConfig

_SVD_PREFIX = f"{SvdLoraConfig.init_marker}:"


def config_of_alias(config: LoraConfig) -> LoraConfig:
    """`config`, or what its `init_lora_weights` means.

    "svd_guided:<path-or-hub-id>" is a `SvdLoraConfig` of these factors.
    """
    alias = config.init_lora_weights
    if isinstance(alias, str) and alias.startswith(_SVD_PREFIX):
        options = {**lora_options(config), "init_lora_weights": True}
        return SvdLoraConfig(**options, svd_factors=os.path.expanduser(alias[len(_SVD_PREFIX) :]))
    return config
