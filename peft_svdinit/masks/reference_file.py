"""Masks that the reference implementation of LoRI wrote (`*_mask.pt`)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from torch import Tensor

from ..models import PREFIX

_MIDDLE = ".lora_B."
# What torch's reader raises over bytes that it did not write.
_DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    SafetensorError,
)


def read_reference_mask(path: str | os.PathLike) -> dict[str, Bool[Tensor, "out rank"]]:
    """Masks by module name, of a file that the reference's `extract_mask.py` wrote.

    Its positions belong to an A that the file does not record: over another A only the number of
    entries per layer and per row keeps its meaning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds anything else than tensors, which is never run, or no
            masks of B, or two of one layer.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"mask: there is no file {file}")
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(
            f"mask: {file} is damaged, or holds more than tensors and was not loaded, for that "
            "could run code; ask its author for a file that torch.load reads with weights_only=True"
        ) from error
    if not isinstance(stored, dict) or not stored:
        raise ValueError(f"mask: {file} must map names of lora_B to masks")
    masks = {}
    for key, mask in stored.items():
        name, middle, _ = str(key).partition(_MIDDLE)
        if not middle or not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(f"mask: {key} in {file} is no mask of a lora_B of a linear layer")
        if mask.layout != torch.strided or mask.is_meta or mask.is_quantized:
            raise ValueError(f"mask: {key} in {file} is no dense tensor with its entries")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask: {key} in {file} has entries other than 0 and 1")
        layer = name.removeprefix(PREFIX)
        if layer in masks:
            raise ValueError(
                f"mask: {file} has two masks of layer {layer}, {key} the second, of two adapters? "
                "Keep those of one"
            )
        masks[layer] = mask.bool()
    return masks
