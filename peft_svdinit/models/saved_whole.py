"""Whole tensors beside an adapter, such as embeddings and norms, as PEFT's `modules_to_save`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from .names import is_within
from .task_types import heads_of_task


@dataclass(frozen=True)
class WholeModules:
    """The modules that an adapter replaces, and where each of their parameters comes from.

    Attributes:
        names: full names of the modules.
        source_of: by parameter of these modules, the parameter whose tensor it takes: itself, or
            the one that it is tied to.
    """

    names: list[str]
    source_of: dict[str, str]

    @property
    def tied(self) -> bool:
        """Whether one tensor goes to several parameters."""
        return any(name != source for name, source in self.source_of.items())


def whole_modules(
    skeleton: nn.Module, given: Collection[str], adapted: Collection[str] = ()
) -> WholeModules:
    """The modules that hold the parameters `given`, checked against how PEFT selects and loads.

    A tensor for a parameter that the base model ties to others, as an embedding to the output head,
    is the tensor of all of them: PEFT replaces modules one by one, and would leave the others at
    the base's value. To untie them, give one for each. Of the heads of the model's task type, which
    PEFT replaces with all that they contain, give all parameters or none.

    Args:
        skeleton: the base model, on the meta device if need be.
        given: names of parameters, `model.norm.weight` say.
        adapted: names of the modules with low-rank factors.

    Raises:
        ValueError: if the base has no such parameter, a module is adapted too or has further
            tensors that are not given, or PEFT would select other modules by these names.
    """
    partners: dict[int, list[str]] = defaultdict(list)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        partners[id(parameter)].append(name)
    source_of: dict[str, str] = {}
    for name in given:
        if name not in parameters:
            raise ValueError(f"modules_to_save: the base model has no parameter {name}")
        source_of[name] = name
        for partner in partners[id(parameters[name])]:
            if partner not in given:
                source_of.setdefault(partner, name)
    names = _modules_of(skeleton, source_of)
    for name in names:
        if name in adapted:
            raise ValueError(f"modules_to_save: {name} has low-rank factors too; leave one out")
        missing = [
            f"{name}.{key}" if name else key
            for key in skeleton.get_submodule(name).state_dict()
            if (f"{name}.{key}" if name else key) not in source_of
        ]
        if missing:
            remedy = "give that too" if missing[0] in parameters else "leave the module out"
            raise ValueError(
                f"modules_to_save: PEFT stores module {name or 'of the whole model'} as a whole, "
                f"and {missing[0]} of it is not given; {remedy}"
            )
    # PEFT compares the ends of names, dots or not: norm would be input_layernorm as well.
    for module, _ in skeleton.named_modules(remove_duplicate=False):
        if module.endswith(tuple(names)) and module not in names:
            raise ValueError(
                f"modules_to_save: PEFT would replace {module} too, whose name ends in that of a "
                "module to save; leave that out"
            )
    return WholeModules(names, dict(sorted(source_of.items())))


def _modules_of(skeleton: nn.Module, parameters: Collection[str]) -> list[str]:
    """The modules of these parameters, or the heads that these are in."""
    heads = heads_of_task(skeleton)
    modules = {name.rpartition(".")[0] for name in parameters}
    inside = {module for module in modules if is_within(module, heads)}
    return sorted(
        modules - inside | {head for head in heads for m in inside if is_within(m, [head])}
    )
