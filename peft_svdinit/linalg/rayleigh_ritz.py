"""The triplets of a matrix within a space of which basis and image are known."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .product import svd_of_product
from .triplets import TruncatedSVD

# Below this share of the largest, a singular vector computed by division by its singular value
# has lost half of float32's digits.
_SMALL = 1e-3


def triplets_of_space(
    basis: Float[Tensor, "side width"],
    image: Float[Tensor, "other width"],
    of_range: bool,
    rank: int,
    norm: float,
    *,
    optimal: bool = False,
) -> TruncatedSVD:
    """Leading `rank` triplets of the projection of A on a space.

    Args:
        basis: orthonormal; of the range (`of_range`, image Aᵀ Q) or of the domain (image A Q).
        rank: triplets kept, at most those the space has.
        norm: ‖A‖_F.
        optimal: whether the space is known to hold the leading triplets.

    Eigenvectors of the image's Gram matrix, accumulated in float64, turn the basis; where wanted
    singular values are too small for that, an SVD of the image does.
    """
    rank = min(rank, basis.shape[1])
    wide = image.double()
    squares, turn = torch.linalg.eigh(wide.mT @ wide)
    squares, turn = squares.flip(0)[:rank].clamp_min(0), turn.flip(1)[:, :rank]
    S = squares.sqrt()
    if float(S[-1]) > _SMALL * float(S[0]):
        turn = turn.to(basis.dtype)
        near, far = basis @ turn, image @ (turn / S.to(basis.dtype))
        S = S.to(basis.dtype)
    else:
        near, S, far_h = svd_of_product(basis, image.mT).truncated(rank)
        far = far_h.mT
    U, V = (near, far) if of_range else (far, near)
    return TruncatedSVD(U, S, V.mT, norm, optimal).with_canonical_signs()
