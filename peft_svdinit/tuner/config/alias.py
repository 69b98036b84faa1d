"""Configurations that a string means, for tools that hand only a string through to PEFT."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

from peft import LoraConfig

from ...masks import load_mask
from .from_file import FromFile
from .lori import LoriConfig
from .stock_saved import StockSavedConfig, lora_options
from .svd import SvdLoraConfig

# Each before ":" and the path or Hub id of factors.
_SVD_PREFIXES: dict[str, dict[str, Any]] = {
    f"{SvdLoraConfig.init_marker}:": {},
    "svd_subspace:": {"svd_start": "subspace"},
    "svd_reference:": {"svd_start": "reference"},
}
_OF_WEIGHT = "svd_weight"
_LORI_PREFIX = f"{LoriConfig.init_marker}:"


def is_alias(init_lora_weights: object) -> bool:
    """Whether a string means a configuration of ours."""
    return isinstance(init_lora_weights, str) and (
        init_lora_weights in (_OF_WEIGHT, LoriConfig.init_marker)
        or init_lora_weights.startswith((*_SVD_PREFIXES, _LORI_PREFIX))
    )


def is_ours(config: LoraConfig) -> bool:
    """Whether a configuration is one of ours, or says by an alias that it means one."""
    return isinstance(config, StockSavedConfig) or is_alias(config.init_lora_weights)


def marked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an adapter's file, with an alias among them known as one from a file.

    Of a saved adapter `inference_mode` is True there. Where it is not, None tells `get_peft_model`,
    which leaves it, from what loads an adapter and sets it.
    """
    alias = options.get("init_lora_weights")
    if not is_alias(alias):
        return options
    inference = options.get("inference_mode") or None
    return {**options, "init_lora_weights": FromFile(alias), "inference_mode": inference}


def config_for(config: LoraConfig, *, loading: bool) -> LoraConfig:
    """The configuration that an adapter is made or loaded with.

    An alias is followed where an adapter is made. It is not where one is loaded, nor out of a saved
    adapter's configuration: it would have this machine read files, or ask for repositories, that
    whoever wrote the adapter chose. The adapter is then that of stock LoRA, and a warning names the
    alias; the weights in its file are all there is to it.

    Args:
        config: any.
        loading: whether saved weights are known to follow: PEFT has a `state_dict` for it, or the
            configuration is one for inference.

    Raises:
        FileNotFoundError, ValueError: as `config_of_alias`.
    """
    alias = config.init_lora_weights
    if isinstance(config, StockSavedConfig) or not is_alias(alias):
        return config
    loading |= isinstance(alias, FromFile) and config.inference_mode is not None
    if not loading:
        return config_of_alias(config)
    warnings.warn(
        f"init_lora_weights={alias!r} is not followed, because the adapter is being loaded or its "
        "configuration is of a saved one: nothing beside the adapter is read, and what its saved "
        "weights lack starts as in stock LoRA. To make a new adapter that starts there, give this "
        "string to a LoraConfig of your own",
        stacklevel=3,
    )
    stock = copy.copy(config)
    stock.init_lora_weights = True
    return stock


def config_of_alias(config: LoraConfig) -> LoraConfig:
    """`config`, or what its `init_lora_weights` means.

    "svd_guided:<path-or-hub-id>" is a `SvdLoraConfig` of these factors, "svd_subspace:" and
    "svd_reference:" are the same with these as `svd_start`, and "svd_weight" begins at the
    principal part of the weights, as PiSSA, with the base untouched; "lori" is a `LoriConfig` with
    its defaults, and "lori:<path-or-hub-id>" one of this mask, its density and its seed.
    """
    alias = config.init_lora_weights
    if isinstance(config, StockSavedConfig) or not isinstance(alias, str):
        return config
    options = {**lora_options(config), "init_lora_weights": True}
    options["inference_mode"] = bool(config.inference_mode)
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
