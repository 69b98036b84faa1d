"""LoRI models over tiny bases, and what the tests read off them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_svdinit import LoriConfig
from peft_svdinit.adapters import compact_adapter_folder
from peft_svdinit.tuner.adapter_layers import lora_layers
from peft_svdinit.tuner.layers.sparse_factor import SparseFactor
from support.peft_fixtures import tiny_base
from support.tiny_models import TARGETS

RANK, DENSITY = 8, 0.25


def lori_config(architecture: str = "llama", **options: Any) -> LoriConfig:
    """A config of rank RANK, scaling 2 and density DENSITY unless `options` say otherwise."""
    defaults: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS[architecture]),
        "lori_density": DENSITY,
        "task_type": "CAUSAL_LM",
    }
    return LoriConfig(**{**defaults, **options})


def lori_model(base: PreTrainedModel | None = None, **options: Any) -> Any:
    """A PeftModel of a fresh tiny Llama, or of `base`."""
    return get_peft_model(base or tiny_base(), lori_config(**options))


def reloaded(folder: Path, base: PreTrainedModel | None = None, **options: Any) -> Any:
    """The adapter of a folder as the LoRI it was; `options` go to PeftModel.from_pretrained."""
    config = LoriConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(base or tiny_base(), str(folder), config=config, **options)


def saved_compact(model: Any, folder: Path, **options: Any) -> Path:
    """The compact file of a model's adapter, which is saved in `folder / "saved"` before."""
    model.save_pretrained(str(folder / "saved"))
    return compact_adapter_folder(folder / "saved", folder, **options)


def sparse_factors(model: nn.Module, adapter_name: str = "default") -> dict[str, SparseFactor]:
    """Every sparse B of an adapter, by the module's name in the base."""
    return {
        name.removeprefix("base_model.model."): cast(SparseFactor, layer.lora_B[adapter_name])
        for name, layer in lora_layers(model, adapter_name)
    }


def factors(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of (A, B), B dense, by the module's name in the base."""
    found = {}
    for name, layer in lora_layers(model, adapter_name):
        pair = (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
        found[name.removeprefix("base_model.model.")] = tuple(
            cast(Tensor, part).detach().clone() for part in pair
        )
    return found


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that an optimizer is given."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def off_mask(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The entries of every dense B that are not trained."""
    masks = {name: factor.mask for name, factor in sparse_factors(model, adapter_name).items()}
    return {
        name: lora_B[~masks[name]] for name, (_, lora_B) in factors(model, adapter_name).items()
    }


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two float32 tensors agree in every bit, the sign of zero included."""
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))
