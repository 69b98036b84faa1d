"""Scores of several matrices ranked together, with what is kept of them so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .mask import LoriMask
from .threshold import threshold

# Entries in work at a time: beside the scores and the masks nothing of their size is made.
_PART = 1 << 20


class Ranked:
    """The matrices that share a budget.

    Args:
        scores: by module name, in the order in which the first of equal ones is kept.
        exclude: masks none of whose entries is kept.
        device: where to rank.

    Attributes:
        masks: the entries that are kept, none at first.
    """

    def __init__(
        self,
        scores: Mapping[str, Float[Tensor, "out rank"]],
        exclude: Sequence[LoriMask],
        device: torch.device,
    ) -> None:
        self._scores, self._exclude = scores, exclude
        self._dtype = reduce(torch.promote_types, (s.dtype for s in scores.values()), torch.float32)
        self.masks: dict[str, Bool[Tensor, "out rank"]] = {
            name: torch.zeros(matrix.shape, dtype=torch.bool, device=device)
            for name, matrix in scores.items()
        }

    def keep_largest(self, names: Iterable[str], count: int, what: str) -> None:
        """Keep the `count` highest scores left in some matrices; of equal ones the first.

        Args:
            what: these matrices, for messages.

        Raises:
            ValueError: if fewer are left.
        """
        names = list(names)
        free = sum(int((left >= 0).sum()) for left, _ in self._parts(names))
        if free < count:
            raise ValueError(
                f"{what} has {free} entries left beside what is excluded, and needs {count}; lower "
                "the density, or exclude less"
            )
        lowest, ties = threshold(lambda: (left for left, _ in self._parts(names)), count)
        for left, kept in self._parts(names):
            kept |= left > lowest
            equal = left == lowest
            if ties and equal.any():
                equal &= equal.cumsum(0) <= ties
                kept |= equal
                ties -= int(equal.sum())

    def _parts(self, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores, of which −1 stands for an entry that is kept or must not be, and their masks."""
        for name in names:
            flat, mask = self._scores[name].reshape(-1), self.masks[name].view(-1)
            excluded = [other.layers[name].mask.reshape(-1) for other in self._exclude]
            for start in range(0, len(flat), _PART):
                part = slice(start, start + _PART)
                left = flat[part].to(mask.device, self._dtype).masked_fill(mask[part], -1)
                for other in excluded:
                    left = left.masked_fill(other[part].to(mask.device), -1)
                yield left, mask[part]
