"""The SVD of a product of two thin matrices, without the product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .spectrum import frobenius_norm
from .triplets import TruncatedSVD, widened


def svd_of_product(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner cols"]
) -> TruncatedSVD:
    """All min(rows, inner, cols) singular triplets of `left @ right`.

    QR of both sides leaves a core of at most inner x inner, whose SVD is taken in float64, so the
    cost is O((rows + cols) * inner²) and no rows x cols matrix exists. Works in float32 or wider
    and returns that dtype, with the sign convention of `TruncatedSVD.with_canonical_signs`.
    """
    left_basis, left_core = torch.linalg.qr(widened(left))
    right_basis, right_core = torch.linalg.qr(widened(right).mT)
    core_U, S, core_Vh = torch.linalg.svd(
        left_core.double() @ right_core.double().mT, full_matrices=False
    )
    dtype = left_basis.dtype
    return TruncatedSVD(
        left_basis @ core_U.to(dtype),
        S.to(dtype),
        core_Vh.to(dtype) @ right_basis.mT,
        norm=frobenius_norm(S),
        optimal=True,
    ).with_canonical_signs()
