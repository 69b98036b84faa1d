"""Adam's moments that a training left beside an adapter: our file, or the Trainer's optimizer."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..factors import LoraAdapter
from ..models import lora_key
from .adam_moments import MOMENTS_FILE_NAME, AdamMoments, load_moments

_OPTIMIZER = "optimizer.pt"
_PARTS = ("exp_avg", "exp_avg_sq", "step")


def moments_beside(adapter: LoraAdapter, keys: Sequence[str]) -> dict[str, AdamMoments]:
    """Moments of a saved adapter by adapter key, from `save_moments` or a Trainer's checkpoint.

    A checkpoint's `optimizer.pt` numbers its parameters and does not name them: group by group, in
    a group in the order of the model. Where a LoRA's A and B are all that is trained, they are in
    one group, and the two orders are one; where there is more, the numbers do not fit.

    Args:
        adapter: in the folder of its training, or of a checkpoint of it.
        keys: of its trained weights in the order of the model, as `lora_parameters` gives them of
            a model with the same layers.

    Raises:
        FileNotFoundError: if neither file is there.
        ValueError: if the layers are others, or a moment has not the shape of its weight.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, product in adapter.items():
        shapes[lora_key(name, "A")] = tuple(product.lora_A.shape)
        shapes[lora_key(name, "B")] = tuple(product.lora_B.shape)
    if set(keys) != set(shapes):
        other = min(set(keys) ^ set(shapes))
        raise ValueError(f"{other} is a weight of one of the two adapters only")
    saved, checkpoint = adapter.folder / MOMENTS_FILE_NAME, adapter.folder / _OPTIMIZER
    if saved.is_file():
        path, found = saved, load_moments(saved)
    elif checkpoint.is_file():
        path, found = checkpoint, _in_order(checkpoint, keys)
    else:
        raise FileNotFoundError(f"there is no {MOMENTS_FILE_NAME} or {_OPTIMIZER} beside it")
    for key, shape in shapes.items():
        parts = (found[key].exp_avg, found[key].exp_avg_sq) if key in found else ()
        if {tuple(part.shape) for part in parts} != {shape}:
            raise ValueError(f"{path} has no Adam moments of the shape of {key}, {shape}")
    return found


def _in_order(path: Path, keys: Sequence[str]) -> dict[str, AdamMoments]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as tensors alone ({reason})") from error
    if not isinstance(saved, dict) or not {"param_groups", "state"} <= saved.keys():
        raise ValueError(f"{path} is no optimizer's state: it lacks param_groups or state")
    trained = [group["params"] for group in saved["param_groups"] if group["params"]]
    if [len(numbers) for numbers in trained] != [len(keys)]:
        raise ValueError(
            f"{path} has {' + '.join(str(len(numbers)) for numbers in trained)} parameters, the "
            f"adapter {len(keys)} in one group"
        )
    found = {}
    for key, number in zip(keys, trained[0], strict=True):
        state: Mapping[str, Any] = saved["state"].get(number, {})
        if all(_is_float(state.get(part)) for part in _PARTS):
            exp_avg, exp_avg_sq, step = (state[part] for part in _PARTS)
            found[key] = AdamMoments(exp_avg.float(), exp_avg_sq.float(), float(step))
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
