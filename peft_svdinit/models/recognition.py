"""Telling a base model from an edited one by a few entries of each of its weights.

Entries are taken where `sampled_positions` says and kept in the weight's dtype. The same weight may
come back in another dtype, after casts in any order, so two samples are compared after both were
rounded to every dtype that one of them fits into, the finest first. Where only one of float16 and
bfloat16 or none was involved, equal weights are then equal bits. Where both were, a value may have
been rounded twice on one side: the first rounding moved it to the midpoint between two values of
the coarser dtype, and the second rounded it away from where the value itself goes. Such values are
one unit of the coarser dtype apart, and one in 2 * coarser unit / finer unit is: 1 in 16 where both
dtypes have their full precision, more or fewer where float16 is subnormal. More of them than
chance explains, and whatever is further apart, is an edit.

What this cannot show: an edit of other entries than those sampled; a change that the dtype of the
loaded base rounds away; and of a single weight whose values fit into both half-precision types, as
those of bfloat16 mostly do, changes of one unit in less than a third of the entries, or in any of
them where hardly a dozen differ from zero. All layers taken together show less: of 200 layers, one
or two in a hundred more than chance explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .grids import HALVES, fits, rounded, unit_of

MOST_ENTRIES = 64
# Odd, and near 64 divided by the golden ratio, so that the positions form a Fibonacci-like lattice:
# no two share a 64th of the rows or of the columns, and neighbours in rows are far in columns.
_STRIDE = 39
_FIRST_ROW_ENTRIES = 8
_FINEST_FIRST = (torch.float32, torch.float16, torch.bfloat16)
# An unedited base is refused with a probability below exp(-20.7) = 1e-9, for a layer and for all.
_LARGEST_SURPRISE = math.log(1e9)

Position = tuple[int, int]


def sampled_positions(shape: tuple[int, int]) -> list[Position]:
    """(row, column) of the entries of an (out, in) weight by which it is recognised.

    They depend on the shape alone. Up to 64 entries, that is all of them; of a larger weight 64
    that are spread over rows and columns, fewer where they coincide.
    """
    rows, cols = shape
    if rows * cols <= MOST_ENTRIES:
        return [(row, col) for row in range(rows) for col in range(cols)]
    middles = ((2 * i + 1, 2 * (_STRIDE * i % MOST_ENTRIES) + 1) for i in range(MOST_ENTRIES))
    parts = 2 * MOST_ENTRIES
    return list(dict.fromkeys((row * rows // parts, col * cols // parts) for row, col in middles))


def entries_at(weight: Float[Tensor, "out in"], positions: Sequence[Position]) -> Tensor:
    """Copies of a few entries, in the weight's dtype and on the CPU."""
    rows, cols = torch.tensor(positions, device=weight.device).unbind(dim=1)
    return weight.detach()[rows, cols].cpu()


def recognition_sample(weight: Float[Tensor, "out in"]) -> Float[Tensor, " n"]:
    """The entries by which a weight is recognised, in its dtype."""
    return entries_at(weight, sampled_positions((weight.shape[0], weight.shape[1])))


@dataclass(frozen=True)
class BaseSample:
    """The entries of a base weight that a factors file remembers.

    Attributes:
        entries: their values.
        of_first_row: whether they are the first of the first row, in float32, as they were in
            files of before; an edit cannot be told by them.
    """

    entries: Float[Tensor, " n"]
    of_first_row: bool = False

    def positions(self, shape: tuple[int, int]) -> list[Position]:
        """Where they are in the (out, in) weight."""
        if self.of_first_row:
            return [(0, col) for col in range(min(_FIRST_ROW_ENTRIES, shape[1]))]
        return sampled_positions(shape)

    def differences(self, found: Float[Tensor, " n"]) -> Differences:
        """How the entries found at these positions differ."""
        if self.of_first_row:
            slack = 0.01 * self.entries.abs().max().item()
            same = torch.allclose(found.float(), self.entries, rtol=0.02, atol=slack)
            return Differences(apart=0 if same else 1)
        return differences(found, self.entries)


@dataclass(frozen=True)
class Differences:
    """How two samples differ after they were rounded to the dtypes that both went through.

    Attributes:
        apart: entries further apart than roundings of one value can be.
        twice_rounded: values that are one unit apart, as rounding twice leaves them; all entries
            of one recorded value weigh as one.
        expected: how many of these the roundings leave on average.
    """

    apart: int = 0
    twice_rounded: float = 0.0
    expected: float = 0.0

    def __add__(self, other: Differences) -> Differences:
        return Differences(
            self.apart + other.apart,
            self.twice_rounded + other.twice_rounded,
            self.expected + other.expected,
        )

    @property
    def are_of_rounding(self) -> bool:
        """Whether casts of one weight explain them.

        Chernoff's bound for a sum of independent numbers in [0, 1], of mean m: P(k or more) <=
        exp(-(k log(k / m) - k + m)) for k > m.
        """
        count, mean = self.twice_rounded, self.expected
        if self.apart or count <= mean:
            return not self.apart
        return count * math.log(count / mean) - count + mean <= _LARGEST_SURPRISE


def differences(
    found: Float[Tensor, " n"], sample: Float[Tensor, " n"], *, one_by_one: bool = False
) -> Differences:
    """Compare the entries of two weights, which may have been cast in between.

    `one_by_one` counts every entry, where equal ones are too many to have been one number.
    """
    one, other = found.double().cpu(), sample.double().cpu()
    involved = [dtype for dtype in _FINEST_FIRST if fits(one, dtype) or fits(other, dtype)]
    for dtype in involved:
        one, other = rounded(one, dtype), rounded(other, dtype)
    differ = one != other
    if not all(dtype in involved for dtype in HALVES):
        return Differences(apart=int(differ.sum()))
    unit, chance = _rounded_twice(one.abs(), other.abs())
    one_unit = ((one - other).abs() <= unit) & (chance > 0)
    # Equal values are rounded alike: in a weight of few distinct values one chance would be many.
    weight = torch.ones_like(chance)
    if not one_by_one:
        _, value, copies = sample.abs().unique(return_inverse=True, return_counts=True)
        weight = 1 / copies[value].double()
    return Differences(
        apart=int((differ & ~one_unit).sum()),
        twice_rounded=float((weight * (differ & one_unit)).sum()),
        expected=float((weight * chance).sum()),
    )


def first_difference(layers: Iterable[tuple[str, Tensor, BaseSample]]) -> str | None:
    """Where a base differs from the one that samples are of, in words; None if it does not.

    Args:
        layers: names, entries found, and the samples to compare them with.
    """
    total = Differences()
    for name, found, sample in layers:
        layer = sample.differences(found)
        if not layer.are_of_rounding:
            return f"layer {name}"
        total += layer
    return None if total.are_of_rounding else "all layers together"


def _rounded_twice(
    one: Float[Tensor, " n"], other: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The coarser unit of the half-precision types, and the chance of being a unit apart.

    At the end of a power of two both values count, since units change there.
    """
    units, chances = [], []
    for size in (one, other):
        fine, coarse = torch.stack([unit_of(size, dtype) for dtype in HALVES]).aminmax(dim=0)
        units.append(coarse)
        chances.append(torch.where(fine < coarse, fine / coarse / 2, 0.0))
    return torch.maximum(*units), torch.maximum(*chances)
