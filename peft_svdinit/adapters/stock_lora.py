"""Stock LoRA folders, which PEFT and servers load without this package, written layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import TensorWriter, write_json
from ..models import CONFIG_NAME, PREFIX, WEIGHTS_NAME, exact_pattern, lora_key
from .carried import Carried
from .rounding import Factors


class LoraShape(NamedTuple):
    """One layer before it is there; `shape` is (out, in)."""

    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype


def lora_config(ranks: Mapping[str, int], **options: Any) -> dict[str, Any]:
    """`adapter_config.json` of layers of these ranks and scaling 1 (alpha = r), as PEFT writes it.

    `r` is the most frequent rank, the larger one of two; `rank_pattern` has the other layers.
    """
    from peft import LoraConfig  # Only here: importing it takes seconds, and files need none of it.

    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    others = exact_pattern({name: rank for name, rank in ranks.items() if rank != usual})
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        inference_mode=True,
        **options,
    )
    entries = config.to_dict().items()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entries}


@contextmanager
def stock_lora(
    folder: Path,
    config: Mapping[str, Any],
    layers: Mapping[str, LoraShape],
    whole: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
) -> Iterator[TensorWriter]:
    """Make a folder with the configuration, and the weights by `write_layer`, in any order.

    Args:
        folder: a new one, that of `OutputFolder.replacing`.
        whole: dtype and shape of tensors that are stored beside the factors, by key.
    """
    write_json(folder / CONFIG_NAME, dict(config))
    layout = dict(whole or {})
    for name, (rank, (rows, columns), dtype) in layers.items():
        layout[lora_key(name, "A")] = dtype, (rank, columns)
        layout[lora_key(name, "B")] = dtype, (rows, rank)
    with TensorWriter(folder / WEIGHTS_NAME, layout, {"format": "pt"}) as writer:
        yield writer


def write_layer(writer: TensorWriter, name: str, factors: Factors) -> None:
    """The two factors of one layer."""
    lora_A, lora_B = factors
    writer.write(lora_key(name, "A"), lora_A)
    writer.write(lora_key(name, "B"), lora_B)


def write_stock_lora(
    folder: Path, config: Mapping[str, Any], layers: Mapping[str, Factors], carried: Carried
) -> None:
    """All layers at once, and what is carried beside them, to a new folder."""
    shapes = {
        name: LoraShape(len(A), (len(B), A.shape[1]), A.dtype) for name, (A, B) in layers.items()
    }
    beside = {PREFIX + name: entry for name, entry in carried.layout.items()}
    with stock_lora(folder, config, shapes, beside) as writer:
        for name, factors in layers.items():
            write_layer(writer, name, factors)
        for name in carried.layout:
            writer.write(PREFIX + name, carried.tensor(name))
