"""The smallest of the k largest entries of many tensors, found by counting.

The bits of floating-point numbers that are not negative are in the order of the numbers. So the
digits of the one wanted are found one after the other, the highest first, by counting how many
entries have each digit: the entries are read once for each, and no copy of them all is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

_BITS = 16
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def threshold(parts: Callable[[], Iterable[Float[Tensor, " n"]]], count: int) -> tuple[float, int]:
    """The `count`-th largest entry, and how many of those equal to it are among the `count`.

    Args:
        parts: gives all entries, part by part, in float32 or all in float64; the same ones each
            time. Negative ones do not count.
        count: from 1 to the number of entries that are not negative.
    """
    found, width = 0, 0
    while True:
        counts, size = torch.zeros(1 << _BITS, dtype=torch.int64), 0
        for part in parts():
            # Zero may have a sign.
            bits = (part[part >= 0] + 0.0).view(_INTEGERS[part.dtype])
            size = 8 * part.itemsize
            shift = size - width - _BITS
            if width:
                bits = bits[bits >> (shift + _BITS) == found]
            digits = (bits >> shift) & ((1 << _BITS) - 1)
            counts += torch.bincount(digits, minlength=1 << _BITS).cpu()
        at_least = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(at_least, count))
        digit = (1 << _BITS) - 1 - place
        count -= int(at_least[place] - counts[digit])
        found, width = found << _BITS | digit, width + _BITS
        if width == size:
            bits = torch.tensor(found, dtype=torch.int32 if size == 32 else torch.int64)
            return bits.view(torch.float32 if size == 32 else torch.float64).item(), count
