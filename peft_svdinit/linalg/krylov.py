"""Randomised block Krylov iteration, Musco and Musco (arXiv:1504.05477)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .orthonormal import orthonormal_basis
from .rayleigh_ritz import triplets_of_space
from .sketch import sketch
from .spectrum import frobenius_norm
from .triplets import TruncatedSVD, balanced, check_rank


def krylov_svd(
    matrix: Float[Tensor, "rows cols"],
    rank: int,
    *,
    block: int | None = None,
    passes: int = 6,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Near-optimal rank-`rank` approximation from `passes` products with a block of vectors.

    Block Golub-Kahan bidiagonalisation with full reorthogonalisation: products with A and Aᵀ
    alternate, and the whole space that they span on the side of the last product is kept, where
    power iteration keeps the last block alone. The image of that space is known from the products
    already made, so that no pass is spent on the projection. Blocks narrower than `rank` do, and
    come nearer to the optimum for the same work (arXiv:2305.02535).

    Args:
        matrix: any finite matrix; not modified.
        rank: number of triplets kept, from 1 to `min(rows, cols)`.
        block: vectors per product; the rank rounded up to a multiple of 16 if None.
        passes: products, at least 2.
        generator: randomness of the first block; a fresh one with seed 0 if not given.

    Raises:
        ValueError: if `rank` is out of range, the passes do not span `rank` directions, or the
            matrix has NaN or infinite entries.

    Error over the optimum on gradients and deltas of fine-tuning at ranks 16 to 64: at most 1.04
    with four passes, 1.017 with five, 1.005 with six, 1.002 with seven.
    """
    check_rank(rank, matrix.shape)
    block = min(default_block(rank) if block is None else block, *matrix.shape)
    if passes < 2 or block < 1 or block * (passes // 2) < min(rank, *matrix.shape):
        raise ValueError(
            f"passes={passes} of block={block} span {block * (passes // 2)} directions, "
            f"rank={rank} needs as many; raise passes or block"
        )
    wide, norm, exponent = balanced(matrix)
    space = KrylovSpace(wide, block, generator)
    for _ in range(passes):
        space.multiply()
    return triplets_of_space(*space.last(), rank, norm).scaled(exponent)


def default_block(rank: int) -> int:
    """The rank rounded up to a multiple of 16, at which matrix products are fastest."""
    return -(-rank // 16) * 16


class KrylovSpace:
    """The growing spaces on both sides of a matrix and their images.

    Side 0 is the domain (cols), whose image under A lies in the rows; side 1 the range, whose
    image under Aᵀ lies in the columns.
    """

    def __init__(self, matrix: Tensor, block: int, generator: torch.Generator | None) -> None:
        self.matrix = matrix
        self.block = sketch(matrix, block, generator)
        self.side = 0
        self.products = 0
        self._bases: list[Tensor | None] = [None, None]
        self._images: list[list[Tensor]] = [[], []]

    def multiply(self) -> None:
        """One product with the newest block, which is made from the last product.

        None any more once the space on one side is the whole side.
        """
        if self.products and not self._next_block():
            return
        # Q.mT @ A reads A along its rows, A.mT @ Q across them.
        forward = self.side == 0
        image = self.matrix @ self.block if forward else (self.block.mT @ self.matrix).mT
        self.products += 1
        self._images[self.side].append(image)

    def _next_block(self) -> bool:
        image = self._images[self.side][-1]
        held = self._bases[1 - self.side]
        room = image.shape[0] - (0 if held is None else held.shape[1])
        if not room:
            return False
        if self.products == 1:
            self._images[self.side].clear()  # The sketch is no orthonormal basis.
        self.side = 1 - self.side
        self.block = orthonormal_basis(image[:, :room], held)
        self._bases[self.side] = (
            self.block if held is None else torch.cat([held, self.block], dim=1)
        )
        return True

    @property
    def width(self) -> int:
        """Directions of the basis on the side of the last product."""
        basis = self._bases[self.side]
        return 0 if basis is None else basis.shape[1]

    @property
    def captured(self) -> float:
        """‖Q Qᵀ A‖_F² of that basis."""
        return sum(frobenius_norm(image) ** 2 for image in self._images[self.side])

    def last(self) -> tuple[Tensor, Tensor, bool]:
        """Basis on the side of the last product, its image, and whether that side is the range."""
        basis = self._bases[self.side]
        assert basis is not None
        return basis, torch.cat(self._images[self.side], dim=1), self.side == 1
