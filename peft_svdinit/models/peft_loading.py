"""Linear layers of which PEFT loads no adapter."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from .peft_names import lora_key


def renamed_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Layers whose tensors PEFT gives other names when it loads an adapter, and then passes over.

    PEFT takes the keys of an adapter for those of older versions, and applies the renaming of
    transformers to them. Some of its rules change a name that is right already, `shared_experts` to
    `shared_experts.` for one.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    empty = {lora_key(name, "A"): torch.empty(1, 1, device="meta") for name in names}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(empty))
    return [name for name in names if lora_key(name, "A") not in loaded]


def refused_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Layers that PEFT refuses to adapt: those whose weight Mamba's kernels read past the layer."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    config, refused = LoraConfig(), []
    for name in names:
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            refused.append(name)
    return refused
