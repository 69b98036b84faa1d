"""Low-rank linear algebra on torch tensors; imports nothing but torch."""

from .adaptive import adaptive_svd
from .gram import gram_subspace_svd, gram_svd
from .krylov import krylov_svd
from .product import svd_of_product
from .randomized import randomized_svd
from .spectrum import (
    SMALLEST_ERROR,
    frobenius_norm,
    rank_for_energy,
    relative_error,
    stable_rank,
)
from .tracker import SubspaceTracker
from .triplets import TruncatedSVD
from .truncated import truncated_svd

__all__ = [
    "SMALLEST_ERROR",
    "SubspaceTracker",
    "TruncatedSVD",
    "adaptive_svd",
    "frobenius_norm",
    "gram_subspace_svd",
    "gram_svd",
    "krylov_svd",
    "randomized_svd",
    "rank_for_energy",
    "relative_error",
    "stable_rank",
    "svd_of_product",
    "truncated_svd",
]
