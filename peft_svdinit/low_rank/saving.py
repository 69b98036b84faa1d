"""Low-rank models on the disk: a dense checkpoint that anybody loads, and the exact factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..files import resolve_folder
from ..models import BaseSample, entries_at, first_difference, model_skeleton, sampled_positions
from ..optim import Moved
from .candidates import low_rank_layers, replace_module_
from .files import PARTS, StoredLayers, remove_files, stored_layers, write_files
from .layer import LowRankLinear
from .moments import to_factors
from .own_save import save_by_
from .plan import LowRankPlan
from .small_form import is_small_form


def save_dense_(model: nn.Module) -> None:
    """Make `model.save_pretrained` write a dense checkpoint with the factors beside it."""
    if isinstance(model, PreTrainedModel):
        save_by_(model, _save_pretrained)


@torch.no_grad()
def load_low_rank(
    path: str | os.PathLike, model: nn.Module | None = None, *, revision: str | None = None
) -> nn.Module:
    """The model of a folder or Hub repository with the very layers that it was saved with.

    Args:
        path: what `save_pretrained` of a low-rank model, or its Trainer, wrote.
        model: the dense model with the weights of that checkpoint, to be changed in place; by
            default it is loaded, of the class that `config.json` names.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        FileNotFoundError: if there is no such folder or it holds no low-rank layers.
        ValueError: if a file is damaged, the folder holds the small form, or the layers are of
            another model or of other weights.
    """
    folder = resolve_folder(path, argument="path", revision=revision)
    if is_small_form(folder):
        raise ValueError(
            f"path: {folder} holds the small form; call register_small_form() and load it by "
            "from_pretrained of transformers"
        )
    with stored_layers(folder, "path") as stored:
        if model is None:
            kind: Any = type(model_skeleton(folder, "path"))
            try:
                model = kind.from_pretrained(str(folder))
            except Exception as error:  # Of any kind: it is made of a stranger's files.
                raise ValueError(
                    f"path: transformers cannot load {folder} ({type(error).__name__}: {error})"
                ) from error
        assert model is not None
        _restored_(model, stored)
    return model


def restore_layers_(model: nn.Module, folder: str | os.PathLike) -> list[Moved]:
    """As `load_low_rank` of a folder, in a model at hand; what took whose place."""
    with torch.no_grad(), stored_layers(Path(folder), "checkpoint") as stored:
        return _restored_(model, stored)


def _restored_(model: nn.Module, stored: StoredLayers) -> list[Moved]:
    plan = stored.plan
    plan.check(model)
    if low_rank_layers(model):
        raise ValueError("the model is of low rank already; densify_ makes it dense")
    different = first_difference(
        (
            name,
            entries_at(_dense_weight(model, name), sampled_positions(layer.shape)),
            BaseSample(stored.sample(name)),
        )
        for name, layer in plan.layers.items()
    )
    if different:
        raise ValueError(
            f"the dense weights do not belong to these factors ({different}): the model has "
            "not the weights of this checkpoint, or others were put beside the factors"
        )
    # A damaged layer is to be noticed before the first one is replaced.
    factors = {name: stored.factors(name) for name in plan.layers}
    moved = []
    for name, tensors in factors.items():
        module = model.get_submodule(name)
        weight: nn.Parameter = module.weight  # pyright: ignore[reportAssignmentType]
        parts = {
            part: nn.Parameter(tensor.to(weight), weight.requires_grad)
            for part, tensor in tensors.items()
        }
        layer = LowRankLinear(
            **parts, bias=getattr(module, "bias", None), transposed=isinstance(module, Conv1D)
        )
        replace_module_(model, module, layer.train(module.training))
        moved.append(to_factors(name, weight, layer))
    save_dense_(model)
    return moved


def _dense_weight(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    return weight.mT if isinstance(module, Conv1D) else weight


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, of dense weights, with the factors beside them.

    A state dict that is given, gathered from shards say, is where weights and factors come from.
    """
    state = model.state_dict() if state_dict is None else dict(state_dict)
    layers = {name: m for name, m in low_rank_layers(model).items() if f"{name}.U" in state}
    factors = {name: _taken(state, name) for name in layers}
    dense = {name: _product(factors[name]) for name in layers}
    for names, layer in _held_as(model):
        if names[0] in layers:
            weight = dense[names[0]]
            weight = weight.mT.contiguous() if layer.transposed else weight
            for name in names:
                _taken(state, name)
                state[f"{name}.weight"] = weight
    has_weights = bool(state)  # What is saved is taken out of it.
    stock = type(model).save_pretrained
    stock(model, save_directory, is_main_process=is_main_process, state_dict=state, **kwargs)
    if not is_main_process:
        return
    folder = Path(save_directory)
    if layers:
        write_files(folder, LowRankPlan.of_factors(factors), factors, dense)
    elif has_weights:
        remove_files(folder)
    if push_to_hub:
        model.push_to_hub(kwargs.pop("repo_id", folder.name), **_of_upload(kwargs))


def _of_upload(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
    return {name: options[name] for name in names if name in options}


def _held_as(model: nn.Module) -> list[tuple[list[str], LowRankLinear]]:
    """Each layer with all of its names: one that several parents share has several."""
    found: dict[LowRankLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankLinear):
            found.setdefault(module, []).append(name)
    return [(names, layer) for layer, names in found.items()]


def _taken(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The factors of a layer, taken out of a state dict."""
    keys = {part: f"{name}.{part}" for part in PARTS}
    return {part: state.pop(key).detach() for part, key in keys.items() if key in state}


@torch.no_grad()
def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """The (out, in) weight, multiplied in float32 and rounded once."""
    left = parts["U"].float()
    if "sv_norm" in parts:
        left = left * parts["sv_norm"].float() * parts["row_norm"].float()[:, None]
    return (left @ parts["Vh"].float()).to(parts["U"].dtype)
