"""Low-rank linear algebra on torch tensors; imports nothing but torch."""

from .adaptive import adaptive_svd
from .gram import gram_matrix, gram_subspace_svd, gram_svd
from .krylov import default_block, krylov_svd
from .product import svd_of_product
from .randomized import randomized_svd
from .spectrum import (
    SMALLEST_ERROR,
    energy,
    frobenius_norm,
    rank_for_energy,
    relative_error,
    stable_rank,
)
from .tracker import SubspaceTracker
from .triplets import TruncatedSVD
from .truncated import Method, krylov_multiplications, krylov_passes, truncated_svd

__all__ = [
    "SMALLEST_ERROR",
    "Method",
    "SubspaceTracker",
    "TruncatedSVD",
    "adaptive_svd",
    "default_block",
    "energy",
    "frobenius_norm",
    "gram_matrix",
    "gram_subspace_svd",
    "gram_svd",
    "krylov_multiplications",
    "krylov_passes",
    "krylov_svd",
    "randomized_svd",
    "rank_for_energy",
    "relative_error",
    "stable_rank",
    "svd_of_product",
    "truncated_svd",
]
