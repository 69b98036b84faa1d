"""Low-rank linear algebra on torch tensors; imports nothing but torch."""

from .product import svd_of_product
from .randomized import randomized_svd
from .spectrum import frobenius_norm, rank_for_energy, relative_error, stable_rank
from .triplets import TruncatedSVD
from .truncated import truncated_svd

__all__ = [
    "TruncatedSVD",
    "frobenius_norm",
    "randomized_svd",
    "rank_for_energy",
    "relative_error",
    "stable_rank",
    "svd_of_product",
    "truncated_svd",
]
