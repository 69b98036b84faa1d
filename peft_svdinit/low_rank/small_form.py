"""A low-rank model as a transformers folder of its factors alone, without the dense weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import WrongKind
from ..models import MODEL_CONFIG, read_model_config
from .candidates import low_rank_layers
from .files import remove_files
from .own_save import save_by_
from .plan import LowRankPlan

METHOD = "svdinit_low_rank"
# Stands in the file where the dense weight of a layer would: without `register_small_form`,
# transformers would leave the factors out and draw the layer at random. Of this weight it says that
# the shape is wrong, and stops.
PLACEHOLDER_SHAPE = (1,)


def save_small_form(
    model: nn.Module, folder: str | os.PathLike, *, max_shard_size: int | str = "50GB"
) -> None:
    """Write the model with its factors in the place of the dense weights.

    After `register_small_form()`, `from_pretrained` of transformers loads the folder; without it,
    that stops with an error about the shapes of these layers' weights. `config.json` carries a
    `quantization_config`, for which servers and PEFT take such a folder to be quantised; the
    model's own configuration stays as it is.

    Args:
        model: a model of transformers with low-rank layers.
        folder: made if it does not exist.
        max_shard_size: as for `save_pretrained`.

    Raises:
        TypeError: if it is no model of transformers, or is quantised.
        ValueError: if no layer is of low rank, the model carries an adapter, or `folder` is a file.
    """
    if not isinstance(model, PreTrainedModel):
        raise WrongKind(
            f"model must be a PreTrainedModel, got {type(model).__name__}; unwrap it, or save its "
            "state_dict"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise WrongKind(
            "model: its configuration has a quantization_config, and there can be one only; save "
            "it with save_pretrained"
        )
    if getattr(model, "peft_config", None):
        raise ValueError("model carries an adapter; merge it, or save the adapter alone")
    if not low_rank_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no layer of low rank; save it with save_pretrained"
        )
    if Path(folder).is_file():
        raise ValueError(f"folder must be a folder, got the file {os.fspath(folder)}")
    _write(model, folder, model.state_dict(), max_shard_size=max_shard_size)


def is_small_form(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a model in the small form."""
    config = Path(folder, MODEL_CONFIG)
    if not config.is_file():
        return False
    found = read_model_config(config, "checkpoint").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def save_small_(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the small form, as long as the model is of low rank."""
    save_by_(model, _save_pretrained)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, in the small form.

    A state dict that is given, gathered from shards say, is where the factors come from.
    """
    state = model.state_dict() if state_dict is None else dict(state_dict)
    options["is_main_process"] = is_main_process
    if _names(model, state) and not getattr(model, "_hf_peft_config_loaded", False):
        _write(model, save_directory, state, **options)
    else:
        type(model).save_pretrained(model, save_directory, state_dict=state_dict, **options)


def _names(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in low_rank_layers(model) if f"{name}.U" in state]


def _write(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state: dict[str, Tensor],
    is_main_process: bool = True,
    **options: Any,
) -> None:
    names = _names(model, state)
    factors = {name: {part: state[f"{name}.{part}"] for part in ("U", "Vh")} for name in names}
    described = LowRankPlan.of_factors(factors).as_dict()
    for name in names:
        if f"{name}.sv_norm" in state:
            described[name]["norms"] = True
        state[f"{name}.weight"] = torch.zeros(PLACEHOLDER_SHAPE)
    if is_main_process:
        remove_files(Path(folder))
    config = model.config
    # transformers also notes dtype and architecture in the configuration that it saves.
    model.config = copy.deepcopy(config)
    model.config.quantization_config = {"quant_method": METHOD, "layers": described}
    try:
        type(model).save_pretrained(
            model, folder, is_main_process=is_main_process, state_dict=state, **options
        )
    finally:
        model.config = config
