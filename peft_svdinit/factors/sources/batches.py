"""The batches that a source of factors reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models import from_all_processes

Batch = Mapping[str, Any]


def held_batches(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """All batches, for they may be read several times.

    Raises:
        ValueError: if there are none, or the model is split between processes and these hold
            different ones.
        TypeError: if one is no mapping of argument names to tensors.
    """
    held = list(batches)
    # Before any refusal, which would be this process's alone while others wait for it.
    numbers = from_all_processes(model, (len(held), _digest(held)))
    if len(numbers) > 1:
        counts = sorted({count for count, _ in numbers})
        raise ValueError(
            "batches differ between the processes that hold parts of the model "
            f"({len(numbers)} different lists, of {' or '.join(map(str, counts))} batches); give "
            "all processes the same ones, those of the first process say"
        )
    if not held:
        raise ValueError("batches is empty; a few batches of the training data are needed")
    for batch in held:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must be mappings of the model's arguments, such as input_ids, "
                f"attention_mask and labels, got {type(batch).__name__}"
            )
    return held


def _digest(batches: Sequence[Batch]) -> str:
    """Of names, shapes and numbers; of what is neither tensor nor plain value, the class alone."""
    whole = hashlib.sha256()
    for number, batch in enumerate(batches):
        items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
        for key, value in sorted(items, key=lambda item: str(item[0])):
            whole.update(f"{number} {key} {type(value).__name__} ".encode())
            if isinstance(value, Tensor):
                whole.update(f"{value.dtype} {tuple(value.shape)} ".encode())
                plain = value.detach().cpu().contiguous().flatten()
                whole.update(plain.view(torch.uint8).numpy().tobytes())
            elif value is None or isinstance(value, bool | int | float | str):
                whole.update(repr(value).encode())
    return whole.hexdigest()


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved."""
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
