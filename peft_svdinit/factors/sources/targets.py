"""The layers of a base model that a source of factors reads, and a state to run it in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...models import (
    base_weight,
    is_plain,
    layers_gathered,
    linear_modules,
    recognition_sample,
    refuse_tensor_parallel,
    reshard,
)
from .dropout import no_dropout_in_functions


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer of the base model."""

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool

    def weight(self) -> Float[Tensor, "out in"]:
        """A float32 copy of the layer's weight."""
        return base_weight(self.module, self.name, transposed=self.transposed)


def target_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, TargetLayer]:
    """The linear layers that LoRA would adapt, by name.

    Raises:
        ValueError: if the model carries an adapter, or no layer matches.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model is a {type(model).__name__} that carries an adapter; take factors from the "
            "base model, before get_peft_model or add_adapter"
        )
    reshard(model)
    layers = {}
    for name, linear in linear_modules(model, target_modules).items():
        module = model.get_submodule(name)
        # The stored weight of a 4-bit layer has another shape than the matrix.
        packed = isinstance(module, nn.Linear)
        rows = module.out_features if packed else linear.out_features
        cols = module.in_features if packed else linear.in_features
        layers[name] = TargetLayer(name, module, rows, cols, linear.transposed)
    refuse_tensor_parallel(model, {name: layer.module for name, layer in layers.items()})
    return layers


def named_layers(model: nn.Module, names: Iterable[str]) -> dict[str, TargetLayer]:
    """The linear layers of exactly these names.

    Raises:
        ValueError: if the model lacks one, or carries an adapter.
    """
    wanted = list(names)
    layers = target_layers(model, wanted)
    missing = [name for name in wanted if name not in layers]
    if missing:
        raise ValueError(
            f"factors are for a layer {missing[0]} that the model lacks ({len(missing)} such): "
            "factors of another model?"
        )
    return {name: layers[name] for name in wanted}


def base_samples(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The entries of each layer's weight by which `save_factors` lets the base be recognised.

    A quantised weight has none: it is rounded so coarsely that no edit could be told.
    """
    samples = {}
    for name, layer in named_layers(model, names).items():
        stored = layer.module.weight
        if isinstance(stored, Tensor) and is_plain(stored):
            samples[name] = recognition_sample(layer.weight()).to(stored.dtype)
    return samples


def groups_within(bytes_of: Mapping[str, int], memory_gb: float) -> list[list[str]]:
    """Consecutive names whose sum of bytes is within `memory_gb`, at least one a group.

    Raises:
        ValueError: if `memory_gb` is not positive.
    """
    if not memory_gb > 0:
        raise ValueError(f"memory_gb must be positive, got {memory_gb}")
    groups: list[list[str]] = []
    used = 0
    for name, need in bytes_of.items():
        if not groups or used + need > memory_gb * 2**30:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += need
    return groups


def input_device(model: nn.Module) -> torch.device:
    """Where a batch has to be."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@contextmanager
def reading(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """Parameters frozen, dropout off, no cache; all of it as it was afterwards.

    A model split by ZeRO-3 or FSDP2 can be run within, by all processes on the same batches.

    With `checkpointing`, gradient checkpointing stays on where it is: transformers asks the
    checkpointed module itself whether it is training, so that this one flag is set, and no other.
    """
    reshard(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module, _ in modes:
            module.training = checkpointing and bool(
                getattr(module, "gradient_checkpointing", False)
            )
        if cache is not None:
            config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
        with layers_gathered(model), no_dropout_in_functions():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        if cache is not None:
            config.use_cache = cache  # pyright: ignore[reportOptionalMemberAccess]


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear layer was called with, by position or by name."""
    return next(iter((*args, *kwargs.values())))
