"""An adapter on the model without its weights: what does not fit is known before they are read."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from peft_svdinit import FactorsFile
from peft_svdinit.factors import LoraAdapter, kind_of, target_layers
from peft_svdinit.training import (
    ModelOptions,
    RecipeArguments,
    StoredQuantised,
    load_skeleton,
    refused_as,
)
from stages.base_config import check_configuration
from stages.lora_options import LoraOptions
from stages.peft_starts import check_peft_init
from stages.rank_budget import parameters_of_rank_one


def adapted_skeleton(model: ModelOptions, lora: LoraOptions) -> Any:
    """The model on the meta device with an adapter of the options' size, at a random start.

    Raises:
        ValueError: as `load_skeleton`, or for an adapter that PEFT cannot make of the model.
    """
    check_configuration(model)
    skeleton = load_skeleton(model)
    plain = lora.stock(
        lora_target_modules=_targets(lora), lora_r=_rank(skeleton, lora), rank_budget=None
    )
    with refused_as(f"PEFT cannot adapt {model.model_name_or_path} as lora_target_modules says"):
        return get_peft_model(skeleton, plain.config(), low_cpu_mem_usage=True)


def check_adapter(model: ModelOptions, lora: LoraOptions, arguments: RecipeArguments) -> None:
    """Refuse an adapter that the model cannot have, or a start that cannot be read or made of it.

    What `init_from` names is left to the run: one that is resumed goes on without it.

    Raises:
        ValueError, OSError, TypeError: naming the option.
    """
    if lora.init_from or arguments.splits_state:
        return
    try:
        adapted = adapted_skeleton(model, lora)
    except StoredQuantised:
        return
    if lora.init not in ("random", "svd"):
        check_peft_init("init", lora.init, lora.lora_r, smallest_layer(adapted))
    quantised = model.load_in_4bit or model.load_in_8bit
    if lora.svd_factors and lora.rank_budget is None and not quantised:
        get_peft_model(load_skeleton(model), lora.config(), low_cpu_mem_usage=True)


def smallest_layer(adapted: Any) -> tuple[int, int]:
    """(out, in) of the smallest layer that has an adapter."""
    layers: list[Any] = [each for each in adapted.modules() if isinstance(each, LoraLayer)]
    return min(((each.out_features, each.in_features) for each in layers), key=_shorter_side)


def _shorter_side(shape: tuple[int, int]) -> int:
    return min(shape)


def _rank(skeleton: Any, lora: LoraOptions) -> int:
    """The rank of all layers, or the one that a budget of parameters pays for."""
    if lora.rank_budget is None:
        return lora.lora_r
    layers = target_layers(skeleton, lora.target_modules)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    return -(-lora.rank_budget // parameters_of_rank_one(shapes, lora.rank_budget))


def _targets(lora: LoraOptions) -> list[str] | None:
    """The layers to adapt: where none are named, those of the source of the start."""
    source = lora.init_from
    if not source:
        return lora.lora_target_modules
    kind = kind_of(source, argument="init_from")
    if lora.lora_target_modules or kind == "model":
        return lora.lora_target_modules
    read = LoraAdapter if kind == "adapter" else FactorsFile
    return list(read(source, argument="init_from"))
