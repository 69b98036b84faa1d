"""Where a fine-tune is another model than its base: heads, which an adapter stores whole."""

from __future__ import annotations

import re

from ...models import StoredParameters, heads_of_task, layer_depth


def heads_of_pair(base: StoredParameters, tuned: StoredParameters) -> list[str]:
    """Full names of modules that are the tuned model's alone, in the order of the model.

    They are the heads that PEFT stores in every adapter of the model's task type; what a tuned
    model of another class has beyond its base, a pooler say; and layers with as many rows as there
    are labels, where the base has other labels.

    Args:
        base, tuned: read as one model, of the tuned one's class and labels.
    """
    found = {*heads_of_task(base.model), *_brought_along(base, tuned), *_relabelled(base, tuned)}
    return [name for name, _ in base.model.named_modules() if name in found]


def stored_in_neither(base: StoredParameters, tuned: StoredParameters) -> list[str]:
    """Modules, in no list of blocks, of which neither checkpoint stores any tensor."""
    missing = {
        name.rpartition(".")[0]
        for name in base.tied_to
        if base.stored(name) is None and tuned.stored(name) is None
    }
    stored = {*base.shapes, *tuned.shapes}
    return sorted(
        module
        for module in missing
        if module
        and layer_depth(module) is None
        and not any(name.startswith(f"{module}.") for name in stored)
    )


def _brought_along(base: StoredParameters, tuned: StoredParameters) -> set[str]:
    """Modules of which the base has nothing, nor of the list of blocks that they are in."""
    if type(base.model).__name__ in (getattr(base.model.config, "architectures", None) or ()):
        return set()
    modules = {name.rpartition(".")[0] for name in tuned.stored_once() if base.stored(name) is None}
    known = [name for name in base.tied_to if base.stored(name) is not None]

    def is_new(module: str) -> bool:
        part = re.split(r"\.\d+(?:\.|$)", module)[0]
        return bool(part) and not any(name.startswith(f"{part}.") for name in known)

    return {module for module in modules if is_new(module)}


def _relabelled(base: StoredParameters, tuned: StoredParameters) -> set[str]:
    labels = getattr(base.model.config, "num_labels", None)
    found = set()
    for name, stored in tuned.stored_once().items():
        expected, before = base.model.get_parameter(name).shape, base.stored(name)
        if before is not None and expected[:1] == (labels,):
            other = base.shapes[before]
            if other[:1] != expected[:1] and other[1:] == expected[1:] == tuned.shapes[stored][1:]:
                found.add(name.rpartition(".")[0])
    return found
