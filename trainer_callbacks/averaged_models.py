"""Running averages of a model's parameters, when its layers get other factors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from peft_svdinit.low_rank import Changed, LowRankLinear, low_rank_layers, replace_module_


def check_averaged(averaged: Sequence[nn.Module], model: nn.Module) -> None:
    """Refuse what is no average of the model.

    Raises:
        ValueError: if its modules are not called as the model's are.
    """
    names = {name for name, _ in model.named_modules()}
    for each in averaged:
        if {name for name, _ in _inner(each).named_modules()} != names:
            raise ValueError(
                "averaged_models must be copies of the model, or AveragedModels of it, got a "
                f"{type(each).__name__} of other modules"
            )


@torch.no_grad()
def take_layers_(averaged: Sequence[nn.Module], model: nn.Module) -> None:
    """Put copies of the model's low-rank layers into its averages, which begin anew in these.

    An average that was factorised by itself would have its factors in another basis, and the mean
    of two bases is no factor of anything.
    """
    for each in averaged:
        inner = _inner(each)
        for name, layer in low_rank_layers(model).items():
            _replace(inner, name, layer)


def drop_layers_(averaged: Sequence[nn.Module], model: nn.Module) -> None:
    """Put copies of dense layers where an average has low-rank ones that the model has not."""
    kept = low_rank_layers(model)
    for each in averaged:
        inner = _inner(each)
        for name, layer in low_rank_layers(inner).items():
            if name not in kept:
                dense = copy.deepcopy(model.get_submodule(name)).requires_grad_(False)
                replace_module_(inner, layer, dense)


@torch.no_grad()
def follow_(averaged: Sequence[nn.Module], changed: Iterable[Changed]) -> None:
    """Bring the averages of factors into the new basis; exact where the rank stays."""
    changes = list(changed)
    for each in averaged:
        inner = _inner(each)
        for one in changes:
            old = inner.get_submodule(one.name)
            new = _replace(inner, one.name, one.layer)
            if one.change is not None and isinstance(old, LowRankLinear):
                new.U.copy_(old.U @ one.change.H.to(old.U))
                new.Vh.copy_(one.change.G.to(old.Vh) @ old.Vh)


def _replace(model: nn.Module, name: str, layer: LowRankLinear) -> LowRankLinear:
    """A copy of `layer` in the place of a module, whose bias stays."""
    old = model.get_submodule(name)
    new = copy.deepcopy(layer).requires_grad_(False)
    new.bias = old.bias  # pyright: ignore[reportAttributeAccessIssue]
    replace_module_(model, old, new)
    return new


def _inner(averaged: nn.Module) -> nn.Module:
    module = getattr(averaged, "module", None)
    return module if isinstance(module, nn.Module) else averaged
