"""`config.json` of a model: what is read of it, and the sizes that a model is made of, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..files import ClassName, Count, Positive, read_json, shortened

MODEL_CONFIG = "config.json"
# What is repeated in a model: making a thousand times as many would take for ever.
_REPEATED = re.compile(
    r"(?:.*_)?(?:n|num)_(?:.*_)?(?:layers?|blocks|stages|experts|codebooks)|"
    r"(?:.*_)?(?:encoder|decoder|hidden)_layers|layers|depth"
)
_MOST_REPEATED = 4096
_LARGEST = 2**31 - 1


_Sizes = Positive | list[Positive] | None


class _ModelConfig(msgspec.Struct, rename={"name_or_path": "_name_or_path"}):
    model_type: str | None = None
    architectures: list[ClassName] | None = None
    name_or_path: str | None = None
    quantization_config: dict[str, Any] | None = None
    hidden_size: _Sizes = None
    intermediate_size: _Sizes = None
    num_hidden_layers: Positive | None = None
    num_attention_heads: _Sizes = None
    num_key_value_heads: _Sizes = None
    vocab_size: Count | None = None
    n_embd: _Sizes = None
    n_layer: Positive | None = None
    n_head: _Sizes = None


def read_model_config(path: Path, argument: str) -> dict[str, Any]:
    """The entries of a `config.json`.

    Args:
        path: the file.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        ValueError: as `read_json`, or if a size is of no model.
    """
    # transformers writes infinities, as limits that are none.
    config = read_json(path, argument, _ModelConfig, constants=True)
    for name, value in _integers(config):
        most = _MOST_REPEATED if _REPEATED.fullmatch(name.rpartition(".")[2]) else _LARGEST
        if value > most:
            raise ValueError(
                f"{argument}: {path}: {name} must be at most {most}, got {shortened(value)}"
            )
    return config


def _integers(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, int]]:
    """All integers in objects, by their dotted names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _integers(value, f"{above}{key}.")
        elif isinstance(value, int):
            yield f"{above}{key}", value
