"""Whether two weights are one that was cast, seen block by block.

Their values tell which half-precision types each went through, whatever they are stored in: a model
in bfloat16 may have been saved in float32. Two weights are one that was cast if

- the tuned one has the values of a half-precision type, and rounding the base gives all of them:
  nothing shows that it was trained;
- the base has the values of such a type, and rounding the tuned one gives all of them. Training
  may leave a weight within the rounding, too, but then not as rounding does, which moves half of
  the entries by less than half of what it can;
- one has the values of float16 and the other those of bfloat16, and the differences are as few and
  as small as rounding twice leaves them, see `recognition`.

Of a weight that was trained, entries that equal the rounded base are no evidence of the contrary:
the delta keeps them, rounding and all, since without them the rest is biased towards zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .grids import HALVES, fits, rounded, unit_of
from .recognition import Differences, differences

# Of entries that rounding moved by less than a quarter of a unit.
_SHARES_OF_ROUNDING = (0.35, 0.65)
# Of fewer, training leaves such a share by chance.
_FEWEST_MOVED = 100
_FEW = 4096


def rounding_size(base: Float[Tensor, " n"], tuned: Float[Tensor, " n"]) -> float:
    """Root mean square of what rounding one of two weights alone puts into their difference.

    0 if both have the values of the same types; by a few entries of each, in any dtype.
    """
    base, tuned = base.float(), tuned.float()
    sizes = [0.0]
    for dtype in HALVES:
        if fits(base, dtype) != fits(tuned, dtype):
            fine = tuned if fits(base, dtype) else base
            sizes.append(float((rounded(fine, dtype) - fine).square().mean().sqrt()))
    return max(sizes)


class CastCheck:
    """Takes the blocks of two weights in any order; answers once it had all."""

    def __init__(self) -> None:
        self._identical = True
        self._base_on, self._tuned_on, self._equal = (dict.fromkeys(HALVES, True) for _ in range(3))
        self._near, self._moved = dict.fromkeys(HALVES, 0.0), dict.fromkeys(HALVES, 0)
        self._twice = Differences()

    def add(self, base: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"]) -> None:
        """One block of each, the same entries; of finite values, in float32 or wider."""
        one, other = base.flatten(), tuned.flatten()
        # Most weights that were trained show it in a few entries, and need no more looking.
        for entries in (slice(_FEW), slice(_FEW, None)):
            if self._may_be_cast:
                self._add(one[entries], other[entries])

    def _add(self, base: Float[Tensor, " n"], tuned: Float[Tensor, " n"]) -> None:
        same = torch.equal(base, tuned)
        self._identical &= same
        for dtype in HALVES:
            sides = [(base, self._base_on), (tuned, self._tuned_on)]
            if same and self._base_on[dtype] == self._tuned_on[dtype]:
                sides = sides[:1]
            for values, on in sides:
                on[dtype] = on[dtype] and fits(values, dtype)
            if len(sides) == 1:
                self._tuned_on[dtype] = self._base_on[dtype]
        if same:
            return
        for dtype in HALVES:
            if not (self._base_on[dtype] or self._tuned_on[dtype]):
                continue
            equal = torch.equal(rounded(base, dtype), rounded(tuned, dtype))
            self._equal[dtype] = self._equal[dtype] and equal
        if self._through_both:
            self._twice += differences(tuned, base, one_by_one=True)
        if self._may_be_cast:
            self._count_moves(base, tuned)

    def _count_moves(self, base: Tensor, tuned: Tensor) -> None:
        for dtype in HALVES:
            if not self._base_on[dtype] or self._tuned_on[dtype]:
                continue
            moved = (base != 0) & (tuned != base)
            part = (tuned - base).abs()[moved] / unit_of(base.abs()[moved], dtype)
            # A quarter itself counts half: of coarse originals it is one of few values.
            near = (part < 0.25).sum() + (part <= 0.25).sum()
            self._near[dtype] += float(near) / 2
            self._moved[dtype] += int(moved.sum())

    @property
    def _through_both(self) -> bool:
        """Whether one may have the values of float16 and the other those of bfloat16."""
        one, other = HALVES
        return (self._base_on[one] and self._tuned_on[other]) or (
            self._base_on[other] and self._tuned_on[one]
        )

    @property
    def _may_be_cast(self) -> bool:
        by_one = (self._equal[d] and (self._base_on[d] or self._tuned_on[d]) for d in HALVES)
        return any(by_one) or (self._through_both and not self._twice.apart)

    @property
    def is_rounding(self) -> bool:
        """Whether the weights differ, and casts of one weight explain all of it."""
        if self._identical or not self._may_be_cast:
            return False
        for dtype in HALVES:
            if self._equal[dtype] and self._tuned_on[dtype]:
                return True
            if self._equal[dtype] and self._base_on[dtype] and self._moves_as_rounding(dtype):
                return True
        coarse = torch.bfloat16
        finer_base = self._tuned_on[coarse] and not self._base_on[coarse]
        finer_tuned = self._base_on[coarse] and not self._tuned_on[coarse]
        if not self._through_both or not self._twice.are_of_rounding:
            return False
        return finer_base or (finer_tuned and self._moves_as_rounding(coarse))

    def _moves_as_rounding(self, dtype: torch.dtype) -> bool:
        least, most = _SHARES_OF_ROUNDING
        if self._moved[dtype] < _FEWEST_MOVED:
            return False
        return least <= self._near[dtype] / max(1, self._moved[dtype]) <= most
