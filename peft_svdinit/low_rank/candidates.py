"""Which layers of a model may be switched to low rank, and why others may not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models import base_weight, is_chosen, is_plain, is_split, is_within, linear_modules
from .layer import LowRankLinear

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A layer that may be switched, dense or of low rank already.

    Attributes:
        name: its full module name.
        module: an nn.Linear, a Conv1D or a LowRankLinear.
        shape: (out, in).
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """in · out."""
        return self.shape[0] * self.shape[1]

    @property
    def break_even(self) -> float:
        """The rank from which on two thin matrices cost as much as the dense one."""
        return self.size / sum(self.shape)

    def weight(self) -> Float[Tensor, "out in"]:
        """The dense layer's weight as an (out, in) copy in float32."""
        return base_weight(self.module, self.name, transposed=isinstance(self.module, Conv1D))


def candidates(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = (),
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The dense linear layers that may be switched by name, and the reasons of the others.

    Of "all-linear" that is all that lies within the base model (`model.base_model`): the heads
    around it, those of models within it and the routers of experts stay dense. Such a layer is
    taken if it is named.

    Raises:
        ValueError: if the model carries an adapter, holds low-rank layers already, no layer
            matches, or one that is named cannot be switched.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model is a {type(model).__name__} that carries an adapter; merge it, or switch the "
            "base model before it gets one"
        )
    low = low_rank_layers(model)
    if low:
        raise ValueError(
            f"model is of low rank already: {next(iter(low))} and {len(low) - 1} other layers are; "
            "shrink_ lowers their ranks"
        )
    found = linear_modules(model, target_modules)
    _check_names(model, target_modules, "target_modules")
    _check_names(model, exclude_modules, "exclude_modules")
    named = target_modules != "all-linear"
    ties = _tied_to(model)
    body, heads = _base_model_name(model), _output_heads(model)
    chosen: dict[str, Candidate] = {}
    reasons: dict[str, str] = {}
    for name, linear in found.items():
        module = model.get_submodule(name)
        reason = None
        if exclude_modules and is_chosen(name, exclude_modules, "exclude_modules"):
            reason = "excluded"
        elif name in ties:
            reason = f"its weight is tied to {ties[name]}"
        elif not _is_stock(module):
            kind = f"{type(module).__name__} of {module.weight.dtype}"
            reason = f"a {kind}, whose weight or forward is no dense layer's"
        elif not named and body and not is_within(name, [body]):
            reason = "a head, outside the base model"
        elif not named and (module in heads or name.endswith("lm_head")):
            reason = "the head of a model within"
        elif not named and _routes(model, name):
            reason = "it chooses between experts"
        if reason is None:
            chosen[name] = Candidate(name, module, (linear.out_features, linear.in_features))
        elif named and reason != "excluded":
            raise ValueError(f"target_modules: {name} cannot be of low rank: {reason}")
        else:
            reasons[name] = reason
    if not chosen:
        raise ValueError(
            f"no layer of {type(model).__name__} is left to be switched: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
        )
    return chosen, reasons


def _check_names(model: nn.Module, choice: str | Sequence[str], argument: str) -> None:
    """Refuse a name of a list that says nothing: what it was to keep dense would not be."""
    linear = linear_modules(model, ".*")
    for each in () if isinstance(choice, str) else choice:
        # An embedding is none, and stays dense; of a block that holds some, more was meant.
        others = {name for name, _ in model.named_modules() if is_chosen(name, [each])}
        holds = any(is_within(name, others) for name in linear)
        if not any(is_chosen(name, [each]) for name in linear) and (holds or not others):
            raise ValueError(
                f"{argument}: no linear layer has the name {each!r} or one that ends so; correct "
                "it, or leave it out"
            )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers of low rank by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is held, by several parents perhaps; it takes the hooks of `old`."""
    for name in _HOOKS:
        # The dictionaries themselves, in which the handles of the hooks remove them.
        setattr(new, name, getattr(old, name))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _is_stock(module: nn.Module) -> bool:
    """Whether forward and weight are those of a dense layer, whatever the class is called."""
    # Accelerate's device maps give a module a forward of its own.
    forward = vars(module).get("forward", type(module).forward)
    known = forward is nn.Linear.forward or forward is Conv1D.forward
    # A parametrised weight, weight_norm's say, is computed from parameters of other names.
    weight = module._parameters.get("weight")
    return known and weight is not None and is_plain(weight) and not is_split(weight)


def _tied_to(model: nn.Module) -> dict[str, str]:
    """Modules whose weight another module holds as well, with that one's name."""
    holders: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(set(names)) > 1
        for name in names
    }


def _output_heads(model: nn.Module) -> set[nn.Module]:
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    found = (module.get_output_embeddings() for module in inner)
    return {head for head in found if head is not None}


def _routes(model: nn.Module, name: str) -> bool:
    """Whether it is, or lies in, a router, or a gate beside a mixture's experts."""
    parts = name.split(".")
    return any(
        "router" in part
        or (
            re.fullmatch(r"(.*_)?gate|wg", part)
            and hasattr(model.get_submodule(".".join(parts[:depth])), "experts")
        )
        for depth, part in enumerate(parts)
    )


def _base_model_name(model: nn.Module) -> str:
    """The attribute that holds the model without its heads, "" where it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
