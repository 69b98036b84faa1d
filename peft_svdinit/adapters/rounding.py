"""The two factors of a LoRA layer as they are stored: in half precision, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..factors import LoraInit

Factors = tuple[Tensor, Tensor]  # lora_A (rank, in), lora_B (out, rank)


def rounded(init: LoraInit, dtype: torch.dtype) -> LoraInit:
    """The same factors in `dtype`.

    Raises:
        ValueError: if an entry is NaN or infinite, or becomes infinite in `dtype`.
    """
    parts = {"lora_A": init.lora_A.to(dtype), "lora_B": init.lora_B.to(dtype)}
    for part, narrow in parts.items():
        if torch.isfinite(narrow).all():
            continue
        wide: Tensor = getattr(init, part)
        if not torch.isfinite(wide).all():
            raise ValueError(f"{part} has NaN or infinite entries")
        raise ValueError(
            f"{part} has an entry of size {wide.abs().max().item():.6g}, above the "
            f"{torch.finfo(dtype).max:.6g} that {dtype} can hold; use bfloat16 or float32, or "
            'split="balanced"'
        )
    return LoraInit(**parts, subtract_initial=init.subtract_initial)


def rounding_error(exact: LoraInit, stored: LoraInit) -> float:
    """‖B A − B̂ Â‖_F of the exact factors B, A and the stored B̂, Â, in float64.

    With E = B − B̂ and F = A − Â the difference is E A + B̂ F = [E B̂] [A; F], whose squared norm
    is the inner product of the Gram matrices of [E B̂] and [A; F]: no out x in matrix is formed,
    and as E and F are exact, nothing large cancels. Of one dtype `rounded` changes nothing.
    """
    if (stored.lora_A.dtype, stored.lora_B.dtype) == (exact.lora_A.dtype, exact.lora_B.dtype):
        return 0.0
    B, A = exact.lora_B.double(), exact.lora_A.double()
    B_hat = stored.lora_B.double()
    left = torch.cat([B - B_hat, B_hat], dim=1)
    right = torch.cat([A, A - stored.lora_A.double()])
    squared = ((left.mT @ left) * (right @ right.mT)).sum().item()
    return math.sqrt(max(0.0, squared))


def stored(
    name: str, init: LoraInit, dtype: torch.dtype, rank: int | None = None
) -> tuple[Factors, float]:
    """lora_A and lora_B of layer `name` in `dtype`, and what rounding changed.

    Args:
        rank: zeros pad the factors to it.

    Raises:
        ValueError: naming the layer, as `rounded` does.
    """
    try:
        narrow = rounded(init, dtype)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    missing = (rank or len(narrow.lora_A)) - len(narrow.lora_A)
    lora_A = functional.pad(narrow.lora_A, (0, 0, 0, missing)).contiguous()
    lora_B = functional.pad(narrow.lora_B, (0, missing)).contiguous()
    return (lora_A, lora_B), rounding_error(init, narrow)


def dtypes_of(layers: Mapping[str, Factors]) -> dict[str, int]:
    """Number of layers by the name of their dtype."""
    return dict(Counter(str(A.dtype).removeprefix("torch.") for A, _ in layers.values()))
