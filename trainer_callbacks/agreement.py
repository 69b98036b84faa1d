"""Whether the processes of a training hold the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor


@torch.no_grad()
def check_equal(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that all processes hold the same bits; a sum and a weighted sum of each are compared.

    Args:
        tensors: whole ones by name, the same names on all processes.
        what: they are, in the message.

    Raises:
        RuntimeError: naming the first tensor that differs.
    """
    sums = torch.stack([_checksum(tensor) for tensor in tensors.values()])
    everyones: Any = gather(sums[None].to(PartialState().device))
    differs = (everyones != everyones[:1]).any(dim=0).any(dim=1)
    if bool(differs.any()):
        name = list(tensors)[int(differs.nonzero()[0])]
        raise RuntimeError(
            f"the processes hold different {what}: {name} is the first of {int(differs.sum())}"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """Two 64-bit sums of the bytes of a tensor, the second one by place."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for index, part in enumerate(content.split(1 << 22)):
        wide = part.long()
        places = torch.arange(1, len(wide) + 1, device=tensor.device)
        total[0] += wide.sum()
        total[1] += (wide * places).sum() * (2 * index + 1)
    return total
