"""Names of modules without what torch's wrappers add: compile, DDP, FSDP, checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .patterns import exact_pattern
from .peft_names import PREFIX

_PARTS = "(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)"
# Of a dotted name, and of one that kohya's programs join by underscores.
_ADDED = re.compile(rf"(?<![^.]){_PARTS}\.|_{_PARTS}(?=_)")
_BEFORE_THE_BASE = re.compile(rf"^(?:(?:{_PARTS}|module)\.)*base_model\.(?:{_PARTS}\.)*model\.")
_DDP = "module."
_PART = re.compile(r"\.(?:lora|hada|lokr)_")
# Which modules PEFT adapts, beside target_modules.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def unwrapped(name: str) -> str:
    """A name without the components of wrappers; DDP's `module` stays, a name like any other."""
    return _ADDED.sub("", name)


def unwrapped_keys(keys: Iterable[str], place: str = "it") -> dict[str, str]:
    """The keys of an adapter without what wrappers add, each with the key as stored.

    DDP's `module` goes where all keys begin with it, before PEFT's prefix: behind that, it is what
    some models call a part of theirs.

    Args:
        keys: as stored.
        place: where they are, for messages.

    Raises:
        ValueError: if two keys become one.
    """
    stored: dict[str, str] = {}
    for key in keys:
        other = stored.setdefault(unwrapped(key), key)
        if other != key:
            raise ValueError(
                f"{place} holds {other} and {key}, which are one tensor, {unwrapped(key)}, but for "
                "what torch's wrappers add to names; delete the one that is out of date"
            )
    if stored and all(key.startswith(_DDP + PREFIX) for key in stored):
        return {key.removeprefix(_DDP): at for key, at in stored.items()}
    return stored


def spelled_in_peft(key: str) -> str:
    """A stored key without PEFT's prefix, wrappers included: PEFT compared patterns with that."""
    return _BEFORE_THE_BASE.sub("", key)


def adapted_module(key: str) -> str:
    """The module that a stored key is of, spelled as PEFT compared patterns with it."""
    return _PART.split(spelled_in_peft(key))[0]


def unwrapped_config(
    config: Mapping[str, Any], names: Iterable[str], patterns: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """An adapter's configuration that means its layers by names without wrappers.

    Args:
        config: as stored, for names with wrappers.
        names: of all its layers, without wrappers.
        patterns: the option, such as `rank_pattern`, and its value for layers that differ from the
            usual.
    """
    exact = {option: exact_pattern(values) for option, values in patterns.items()}
    targets, narrowing = config.get("target_modules"), [o for o in _NARROWING if config.get(o)]
    if isinstance(targets, list) and not narrowing and not any("." in name for name in targets):
        return {**config, **exact}  # Last components, which wrappers leave alone.
    return {**config, **exact, **dict.fromkeys(narrowing), "target_modules": list(names)}
