"""What PEFT calls the files of a saved adapter and the tensors in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What PEFT puts before the names of the base model's modules and parameters.
PREFIX = "base_model.model."


def lora_key(name: str, part: Literal["A", "B"]) -> str:
    """The saved name of `lora_A` or `lora_B` of a module."""
    return f"{PREFIX}{name}.lora_{part}.weight"


def pattern_value(
    patterns: Mapping[str, Any] | None, name: str, default: Any, *, spelled: str | None = None
) -> Any:
    """The value of a module in a `rank_pattern` or `alpha_pattern`: that of the first key to match.

    A key matches the end of the name, from a dot on, as a regular expression.

    Args:
        patterns: by such keys.
        name: of the module.
        default: where none matches.
        spelled: the name with what wrappers add, tried before the one without: patterns were
            matched with a wrapper that was there before PEFT, and not with one that came after.
    """
    for tried in (name,) if spelled is None else (spelled, name):
        for key, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({key})$", tried):
                return value
    return default
