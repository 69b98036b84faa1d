"""Which stored tensors a parameter is made of, by the rules under which transformers loads models.

Checkpoints keep the names and the layout of older versions, in which q, k and v may be one tensor
and experts one by one. transformers renames and converts them as it loads a model, and back as it
saves one; its rules are asked here, without a weight being read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .wrappers import unwrapped


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that become parameters by a computation.

    Attributes:
        converter: transformers' rule.
        first: the parameter under which transformers applies it.
        sources: (pattern of the rule, stored key), in the order in which they are loaded.
        shapes: of the parameters that come out.
    """

    converter: WeightConverter
    first: str
    sources: tuple[tuple[str, str], ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def keys(self) -> list[str]:
        """The stored keys."""
        return [key for _, key in self.sources]

    def __call__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters made of `tensors`, which are some or all of the sources, by key."""
        chosen = [(pattern, key) for pattern, key in self.sources if key in tensors]
        return _converted(self.converter, self.first, chosen, model, tensors)

    def rows(self) -> list[list[str]] | None:
        """The sources of each first index of a stack of experts; None of any other parameter."""
        first, *rest = self.converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        if not stacks or not all(isinstance(op, Concatenate) and op.dim > 0 for op in rest):
            return None
        by_pattern: dict[str, list[str]] = {}
        for pattern, key in self.sources:
            by_pattern.setdefault(pattern, []).append(key)
        return [list(keys) for keys in zip(*by_pattern.values(), strict=True)]


@dataclass(frozen=True)
class StoredLayout:
    """Where each parameter and persistent buffer of a model is in a checkpoint.

    Attributes:
        renamed: parameter to the stored key whose tensor it is.
        converted: parameter to what it is made of.
        unknown: names, after renaming, that the model does not have, to their stored keys.
    """

    renamed: dict[str, str]
    converted: dict[str, Conversion]
    unknown: dict[str, str]


def stored_layout(
    model: nn.Module, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> StoredLayout:
    """Lay a checkpoint out as transformers would load it.

    Args:
        model: the model on the meta device.
        stored: shape and dtype by key.

    Raises:
        ValueError: if the tensors of a conversion do not fit together.
    """
    known = model.state_dict()
    renamings, converters = _rules(model)
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    layout = StoredLayout({}, {}, {})
    grouped: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        plain = unwrapped(key)
        name, pattern = rename_source_key(plain, renamings, converters, prefix, known)
        if name not in known and plain in known:
            name, pattern = rename_source_key(plain, [], [], prefix, known)
        if name not in known:
            layout.unknown[plain if pattern else name] = key
        elif pattern is None:
            layout.renamed.setdefault(name, key)
        else:
            grouped.setdefault(name, (rule_of[pattern], []))[1].append((pattern, key))
    for first, (converter, sources) in grouped.items():
        conversion = _conversion(converter, first, sources, model, stored)
        layout.converted.update(dict.fromkeys(conversion.shapes.keys() & known, conversion))
    return layout


def _conversion(
    converter: WeightConverter,
    first: str,
    sources: Sequence[tuple[str, str]],
    model: nn.Module,
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Conversion:
    empty = {
        key: torch.empty(stored[key][0], dtype=stored[key][1], device="meta") for _, key in sources
    }
    try:
        made = _converted(converter, first, sources, model, empty)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers cannot make {first} of its tensors {sources[0][1]} and so on: {error}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    return Conversion(converter, first, tuple(sources), shapes)


def _converted(
    converter: WeightConverter,
    first: str,
    sources: Sequence[tuple[str, str]],
    model: Any,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    # A converter keeps what it is given: each use needs one of its own.
    fresh = copy.deepcopy(converter)
    for pattern, key in sources:
        fresh.add_tensor(first, key, pattern, tensors[key])  # pyright: ignore[reportArgumentType]
    made: dict[str, Any] = fresh.convert(first, model=model, config=model.config)
    return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def module_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """What modules are called in `model`, by names that may be those of older versions.

    A name that the model does not have under any rule of transformers stays as it is.

    Raises:
        ValueError: if two names are of one module.
    """
    modules = {name for name, _ in model.named_modules()}
    renamings, _ = _rules(model)
    prefix, known = getattr(model, "base_model_prefix", ""), model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], prefix, known)
        renamed = key.removesuffix(".weight")
        found[name] = name if name in modules or renamed not in modules else renamed
    first: dict[str, str] = {}
    for name, module in found.items():
        if first.setdefault(module, name) != name:
            raise ValueError(f"{first[module]} and {name} are both module {module} of the model")
    return found


def _rules(model: nn.Module) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Fresh ones: some remember what they were used for."""
    rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )
