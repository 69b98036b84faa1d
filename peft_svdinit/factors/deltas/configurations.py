"""Whether two configurations describe one function of the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...models import model_configuration

# A change of these makes another model of the same tensors.
_ARCHITECTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
# These say nothing about the function, or are compared as tensors.
_IGNORED = re.compile(
    r"_.*|transformers_version|dtype|torch_dtype|use_cache|.*_token_ids?|tie_word_embeddings|"
    r"vocab_size|architectures|.*dropout.*|.*_pdrop|initializer_.*|output_.*|return_dict|"
    r"problem_type|id2label|label2id|task_specific_params|is_encoder_decoder|pad_.*|.*name.*"
)


def changed_settings(
    base: Path, tuned: Path, arguments: tuple[str, str]
) -> dict[str, tuple[Any, Any]]:
    """Settings of two model folders that differ, dotted name to (base, tuned).

    None if `tuned` has no configuration, as an export of weights alone does not.

    Args:
        base, tuned: the folders.
        arguments: by which the user gave them.

    Raises:
        ValueError: if they are of different architectures, or one is damaged.
    """
    if not (tuned / "config.json").is_file() or not (base / "config.json").is_file():
        return {}
    before, after = (
        _flat(model_configuration(folder, name).to_dict())
        for folder, name in zip((base, tuned), arguments, strict=True)
    )
    changed = {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
    for setting in _ARCHITECTURE:
        for name, (old, new) in changed.items():
            if name.rpartition(".")[2] == setting:
                raise ValueError(
                    f"{arguments[1]}: {name} is {new!r} in its config.json, of the base it is "
                    f"{old!r}: another architecture, whose weights cannot be compared"
                )
    return changed


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, without those that do not count."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if _IGNORED.fullmatch(str(name)):
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
