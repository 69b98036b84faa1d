"""The SVD of a product of two thin matrices, without the product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .spectrum import frobenius_norm
from .triplets import TruncatedSVD, balanced

# Where a condition number may be squared in float64 without loss of float32's digits: mean square
# of the inverse of the scaled triangle, and the smallest singular value over the largest.
_LARGEST_INVERSE, _SMALLEST_SHARE = 16.0, 1e-4
# Lengths of columns whose reciprocals float32 has with room to spare.
_SHORTEST_COLUMN = 1e-30


def svd_of_product(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner cols"]
) -> TruncatedSVD:
    """All min(rows, inner, cols) singular triplets of `left @ right`.

    With left = Q R and rightᵀ = P T, the triplets are those of the small core R Tᵀ, turned by Q and
    P: O((rows + cols) * inner²), and no rows x cols matrix exists. Of float32, triangles and core
    go through Gram matrices in float64 where these are well conditioned, at two thirds of the time
    of Householder's QR, which serves all else. Works in float32 or wider and returns that dtype,
    with the sign convention of `TruncatedSVD.with_canonical_signs`.
    """
    left, _, left_exponent = balanced(left)
    right, _, right_exponent = balanced(right)
    dtype = left.dtype
    squared = dtype == torch.float32  # Nothing is wider than float64 to square it in.
    near, far = _factorised(left, squared), _factorised(right.mT, squared)
    core_U, S, core_V = _core_svd(near.triangle @ far.triangle.mT, squared)
    found = TruncatedSVD(
        near.turned(core_U, dtype),
        S.to(dtype),
        far.turned(core_V, dtype).mT,
        norm=frobenius_norm(S),
        optimal=True,
    )
    return found.with_canonical_signs().scaled(left_exponent + right_exponent)


class _Factorised(NamedTuple):
    """columns = Q R: R in float64, and Q = `columns @ inverse`, or `columns` without an inverse."""

    triangle: Tensor
    columns: Tensor
    inverse: Tensor | None

    def turned(self, core: Tensor, dtype: torch.dtype) -> Tensor:
        """Q @ core."""
        turn = core if self.inverse is None else self.inverse @ core
        return self.columns @ turn.to(dtype)


def _factorised(columns: Tensor, squared: bool) -> _Factorised:
    if squared and columns.shape[1] <= columns.shape[0]:
        wide = columns.double()
        gram = wide.mT @ wide
        scale = gram.diagonal().sqrt()
        lower, failed = torch.linalg.cholesky_ex(gram / scale / scale[:, None])
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            well = float(inverse.square().sum()) <= _LARGEST_INVERSE * len(lower)
            if well and float(scale.min()) > _SHORTEST_COLUMN:
                return _Factorised(lower.mT * scale, columns, inverse.mT / scale[:, None])
    basis, triangle = torch.linalg.qr(columns)
    return _Factorised(triangle.double(), basis, None)


def _core_svd(core: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) in float64; from the eigenvectors of core coreᵀ where no value is small."""
    if squared and core.shape[0] <= core.shape[1]:
        squares, U = torch.linalg.eigh(core @ core.mT)
        squares, U = squares.flip(0), U.flip(1)
        if float(squares[-1]) > _SMALLEST_SHARE**2 * float(squares[0]):
            S = squares.sqrt()
            return U, S, core.mT @ U / S
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return U, S, Vh.mT
