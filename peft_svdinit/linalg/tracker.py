"""The leading subspace of a matrix that changes slowly, followed from step to step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .orthonormal import orthonormal_basis
from .rayleigh_ritz import triplets_of_space
from .sketch import sketch
from .spectrum import frobenius_norm
from .triplets import TruncatedSVD, balanced, check_rank, widened


class SubspaceTracker:
    """Truncated SVD of the running mean of matrices, two products per update.

    Each update starts the subspace iteration from the last one's result: with V the right vectors
    so far, Q = orth(M V) and the triplets are those of Q Qᵀ M, whose right vectors are the next V.
    Errors shrink by (σ_{l+1}/σ_r)² per update plus the drift of M. Following a mean rather than the
    raw matrices is what makes it accurate: on gradients of fine-tuning with decay 0.9, within 0.4 %
    of the optimal error, where raw gradients stay 7 to 17 % above.

    Args:
        rank: triplets of each result.
        decay: share of the mean that an update keeps, in [0, 1): M ← decay M + (1 − decay) matrix.
            0 follows the matrices themselves, and no mean is stored.
        oversampling: further vectors that are followed.
        generator: randomness of the first block.

    Memory: the mean, of the matrix's shape, and cols * (rank + oversampling).
    """

    def __init__(
        self,
        rank: int,
        *,
        decay: float = 0.9,
        oversampling: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if oversampling < 0:
            raise ValueError(f"oversampling must not be negative, got {oversampling}")
        self.rank, self.decay, self.oversampling = rank, decay, oversampling
        self._generator = generator
        self._mean: Tensor | None = None
        self._block: Tensor | None = None

    def update(self, matrix: Float[Tensor, "rows cols"]) -> TruncatedSVD:
        """Triplets of the mean with `matrix` added.

        Raises:
            ValueError: if the rank is out of range, the shape differs from the last one's, or an
                entry is NaN or infinite; the state is then unchanged.
        """
        check_rank(self.rank, matrix.shape)
        if self._block is not None and self._block.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"matrix must keep its {self._block.shape[0]} columns, got {tuple(matrix.shape)}"
            )
        mean = widened(matrix)
        if self._mean is not None:
            if self._mean.shape != matrix.shape:
                raise ValueError(
                    f"matrix must keep the shape {tuple(self._mean.shape)}, got "
                    f"{tuple(matrix.shape)}"
                )
            mean = torch.lerp(mean, self._mean, self.decay)
        wide, norm, exponent = balanced(mean)
        block = self._block
        if block is None:
            width = min(self.rank + self.oversampling, *matrix.shape)
            # One power step makes up for the missing past.
            start = orthonormal_basis(wide @ sketch(wide, width, self._generator))
            block = orthonormal_basis((start.mT @ wide).mT)
        basis = orthonormal_basis(wide @ block)
        image = (basis.mT @ wide).mT
        svd = triplets_of_space(basis, image, True, self.rank, norm).scaled(exponent)
        self._block = orthonormal_basis(image)
        if self.decay:
            # The first mean may be the caller's own tensor, which the next backward overwrites.
            self._mean = mean.clone() if mean is matrix else mean
        return svd

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the mean and the block, for a resume; empty before the first update."""
        held = {"mean": self._mean, "block": self._block}
        return {name: tensor.clone() for name, tensor in held.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a copy of what `state_dict` of a tracker with the same options returned.

        Raises:
            ValueError: if names or shapes are not those of such a tracker, or an entry is NaN or
                infinite; the state is then unchanged.
        """
        names = ["block", "mean"] if self.decay else ["block"]
        if state and sorted(state) != names:
            raise ValueError(
                f"the state of a tracker with decay={self.decay} has {names}, got {sorted(state)}"
            )
        copies = {name: widened(tensor).clone() for name, tensor in state.items()}
        if copies:
            self._check_shapes(**{name: tuple(copy.shape) for name, copy in copies.items()})
        for copy in copies.values():
            frobenius_norm(copy)
        self._mean, self._block = copies.get("mean"), copies.get("block")

    def _check_shapes(self, block: tuple[int, ...], mean: tuple[int, ...] | None = None) -> None:
        """Raise ValueError unless these are the shapes of a state of this tracker."""
        most = self.rank + self.oversampling
        fits = len(block) == 2 and self.rank <= block[1] <= min(most, block[0])
        if mean is not None:
            fits = fits and len(mean) == 2 and block == (mean[1], min(most, *mean))
        if not fits:
            raise ValueError(
                f"the state of a tracker with rank={self.rank}, oversampling={self.oversampling} "
                f"has a mean (rows, cols) and a block (cols, {most} or the smaller side), got "
                f"mean {mean} and block {block}"
            )
