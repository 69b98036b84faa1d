"""What resizing needs to know of a layer's delta, whatever form the file stores it in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from ...factors import LowRankFactors

Shapes = Mapping[str, tuple[int, ...]]
Parts = Mapping[str, Tensor]  # in float32


class LayerDelta(Protocol):
    """The delta of one layer in a factored form."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); the kernel of a convolution counts to its inputs."""
        ...

    def factors(self, rank: int | None = None) -> LowRankFactors:
        """Its leading `rank` triplets, or all, beside the exact norm."""
        ...

    def product(self) -> tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]:
        """Two matrices whose product it is, exactly."""
        ...


@dataclass(frozen=True)
class LayerHeader:
    """What the shapes of a layer's tensors say before any is read.

    Attributes:
        shape: (out, in * kernel) of the delta as a matrix.
        kernel: size of a convolution's kernel, empty for a linear layer.
        rank: the largest rank that the form can express, at most min(shape).
        dim: what alpha is divided by to give the scaling; None if the form ignores alpha.
        parameters: number of stored values.
    """

    shape: tuple[int, int]
    kernel: tuple[int, ...]
    rank: int
    dim: int | None
    parameters: int


@dataclass(frozen=True)
class Algorithm:
    """A way to store a delta.

    Attributes:
        name: for people.
        parts: names of the tensors of a layer.
        header: what the shapes of a layer's tensors, by part, say; raises ValueError if a part is
            missing, superfluous or of a wrong shape.
        delta: what the tensors stand for, times a scaling.
    """

    name: str
    parts: tuple[str, ...]
    header: Callable[[Shapes], LayerHeader]
    delta: Callable[[Parts, float], LayerDelta]


def require_parts(shapes: Shapes, needed: Sequence[str]) -> None:
    """Raise ValueError unless `shapes` has exactly the parts `needed`, of two dimensions each."""
    if set(shapes) != set(needed):
        raise ValueError(f"it needs {', '.join(needed)}, but has {', '.join(sorted(shapes))}")
    for part in needed:
        if len(shapes[part]) != 2:
            raise ValueError(f"{part} must be a matrix, but has shape {shapes[part]}")


def require_product(shapes: Shapes, left: str, right: str) -> None:
    """Raise ValueError unless the matrices `left` and `right` can be multiplied."""
    if shapes[left][1] != shapes[right][0] or 0 in (*shapes[left], *shapes[right]):
        raise ValueError(
            f"{left} {shapes[left]} and {right} {shapes[right]} do not form a product of two "
            "matrices"
        )


def count(shapes: Shapes) -> int:
    """Number of values in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())
