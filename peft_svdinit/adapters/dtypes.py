"""The dtypes that adapters are stored in, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def torch_dtype(name: Dtype) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: if adapters are not stored in it.
    """
    if name not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {name!r}")
    import torch  # Only here: verbs read their options without it.

    return getattr(torch, name)
