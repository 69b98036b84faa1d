"""Which layers PEFT adapts: in mixture-of-experts models it reads some names as other targets."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .architecture import is_chosen
from .peft_loading import refused_layers, renamed_layers


def misread_targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of linear layers, those that no list or expression in `target_modules` makes PEFT adapt.

    In models whose experts became one parameter, PEFT takes every name that ends as those of their
    former layers did, `gate_proj` say, for that parameter, and adapts it in place of the dense
    layers and shared experts that have such a name.

    Args:
        model: a transformers model, on the meta device if need be.
        names: full names of modules.
    """
    from peft import LoraConfig

    names, groups = list(names), defaultdict(list)
    for name in names:
        groups[_last_part(name)].append(name)
    kept = set()
    for group in groups.values():
        read = _as_peft_reads(model, LoraConfig(target_modules=group))
        kept |= set() if read is None else set(read.target_modules)
    return [name for name in names if name not in kept]


def refuse_unloadable_layers(model: nn.Module, names: Collection[str], remedy: str) -> None:
    """Raise ValueError if PEFT loads no adapter of some linear layers, or takes them for others.

    Args:
        model: a transformers model, on the meta device if need be.
        names: full names of the layers.
        remedy: what leaves layers out, to which their names are added.
    """
    reasons = {
        "takes the names of {} for its fused experts, however they are spelt": misread_targets,
        "renames the tensors of {} as it loads an adapter, and drops them": renamed_layers,
        "refuses adapters of {}": refused_layers,
    }
    found = {what: layers_of(model, names) for what, layers_of in reasons.items()}
    unloadable = [name for layers in found.values() for name in layers]
    if not unloadable:
        return
    what, layers = next((what, layers) for what, layers in found.items() if layers)
    these = f"{len(layers)} linear layers of {type(model).__name__}, {layers[0]} the first,"
    endings = " ".join(dict.fromkeys(map(_ending, unloadable)))
    raise ValueError(
        f"target_modules: PEFT {what.format(these)}, so that no adapter has these layers; "
        + ("choose other layers" if set(unloadable) == set(names) else f"{remedy} {endings}")
    )


def refuse_misread_config(model: nn.Module, config: Any) -> None:
    """Raise ValueError if PEFT adapts other modules under a LoraConfig than it selects by name.

    Args:
        model: a transformers model, with adapters or without.
        config: the configuration, which stays as it is.
    """
    if config.target_modules is None:
        return
    read = _as_peft_reads(model, config)
    if read is not None and _targets(read) == _targets(config):
        return
    asked = _selected(model, config)
    more = set() if read is None else set(read.target_parameters) - set(_parameters(config))
    if read is not None and not more and _selected(model, read) == asked:
        return
    possible = set(asked) - set(misread_targets(model, asked))
    targets = exact_targets(model, [name for name in asked if name in possible])
    others = "a part of its fused experts" if read is None else "other layers"
    raise ValueError(
        f"target_modules: in {type(model).__name__}, a mixture of experts, PEFT reads "
        f"{_shown(config.target_modules)} as {', '.join(sorted(more)) or others} too, and a "
        f"{type(config).__name__} is for the linear layers of these names alone; "
        + (f"set target_modules={targets}" if targets else "choose other layers")
    )


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | None:
    """`target_modules` that select exactly these modules: last name parts if they do, else names.

    None if full names select more, since PEFT compares the ends of names.
    """
    everything = [name for name, _ in model.named_modules()]
    for targets in (sorted({_last_part(name) for name in names}), names):
        choice = frozenset(targets)
        if {name for name in everything if is_chosen(name, choice)} == set(names):
            return targets
    return None


def _as_peft_reads(model: nn.Module, config: Any) -> Any | None:
    """What PEFT makes of a configuration before it looks for layers; None if it refuses to."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = copy.copy(config)
    read.rank_pattern = dict(config.rank_pattern or {})  # Which PEFT writes to.
    read.alpha_pattern = dict(config.alpha_pattern or {})
    try:
        convert_peft_config_for_transformers(read, model, None)
    except ValueError:  # A part of a fused parameter alone.
        return None
    return read


def _selected(model: nn.Module, config: Any) -> list[str]:
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    listed = _maybe_include_all_linear_layers(copy.copy(config), model)
    names = [name for name, _ in model.named_modules() if name]
    return [name for name in names if check_target_module_exists(listed, name)]


def _targets(config: Any) -> tuple[Any, set[str]]:
    modules = config.target_modules
    return modules if isinstance(modules, str) else set(modules), set(_parameters(config))


def _parameters(config: Any) -> Collection[str]:
    return config.target_parameters or ()


def _shown(targets: str | Collection[str]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(sorted(targets)[:5])


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _ending(name: str) -> str:
    """The last two parts or more, the first no number: of dense layers, and of no experts."""
    parts = name.split(".")
    start = len(parts) - 2
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[max(start, 0) :])
