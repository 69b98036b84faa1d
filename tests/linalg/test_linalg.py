"""Low-rank linear algebra against float64 twins and the laws it states."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.allocations import LargestResult
from support.strategies import (
    Product,
    dtypes,
    matrices,
    matrices_with_rank,
    matrix_of_spectrum,
    products,
    seeds,
    shapes,
    wide_dtypes,
)
from torch.testing import assert_close

from peft_svdinit.linalg import (
    Method,
    TruncatedSVD,
    energy,
    frobenius_norm,
    rank_for_energy,
    relative_error,
    stable_rank,
    svd_of_product,
    truncated_svd,
)
from peft_svdinit.linalg.randomized import randomized_svd

METHODS = get_args(Method)
OPTIMAL = ("exact", "gram")


def dense(svd: TruncatedSVD) -> torch.Tensor:
    return (svd.U * svd.S) @ svd.Vh


def error(matrix: torch.Tensor, svd: TruncatedSVD) -> float:
    return reference.frobenius(reference.array(matrix) - reference.array(dense(svd)))


def assert_singular_triplets(svd: TruncatedSVD, rank: int) -> None:
    identity = torch.eye(rank, dtype=svd.S.dtype)
    loose = reference.Tolerance(rtol=0.0, atol=1e-5 if svd.S.dtype == torch.float32 else 1e-12)
    assert_close(svd.U.mT @ svd.U, identity, **loose)
    assert_close(svd.Vh @ svd.Vh.mT, identity, **loose)
    assert (svd.S >= 0).all() and (svd.S.diff() <= 0).all()


def assert_canonical_signs(svd: TruncatedSVD) -> None:
    # Of two largest entries of equal magnitude, one has to be positive.
    assert (svd.U.amax(dim=0) >= -svd.U.amin(dim=0)).all()


@given(case=matrices_with_rank())
def test_truncation_error_is_the_discarded_spectrum(case):
    matrix, rank = case
    found = error(matrix, truncated_svd(matrix, rank))
    assert found == pytest.approx(
        reference.discarded(matrix, rank), abs=reference.tolerance(matrix)["atol"]
    )


@given(case=matrices_with_rank(wide_dtypes))
def test_spectral_error_of_the_exact_truncation_is_the_next_singular_value(case):
    matrix, rank = case
    assume(rank < min(matrix.shape))
    residual = reference.array(matrix) - reference.array(dense(truncated_svd(matrix, rank)))
    assert np.linalg.norm(residual, ord=2) == pytest.approx(
        reference.singular_values(matrix)[rank], abs=reference.tolerance(matrix)["atol"]
    )


def test_the_frobenius_error_is_not_the_next_singular_value():
    matrix = matrix_of_spectrum((8, 8), [1.0] * 8, seed=0)
    assert error(matrix, truncated_svd(matrix, 4)) == pytest.approx(2.0)


@pytest.mark.parametrize("method", METHODS)
@given(case=matrices_with_rank())
def test_every_method_gives_singular_triplets_with_canonical_signs(method, case):
    matrix, rank = case
    before = matrix.clone()
    svd = truncated_svd(matrix, rank, method=method)
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == (
        (matrix.shape[0], rank),
        (rank,),
        (rank, matrix.shape[1]),
    )
    assert svd.S.dtype == torch.promote_types(matrix.dtype, torch.float32)
    assert_singular_triplets(svd, rank)
    assert_canonical_signs(svd)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("method", METHODS)
@given(case=matrices_with_rank(wide_dtypes))
def test_a_transposed_matrix_has_the_transposed_approximation(method, case):
    matrix, rank = case
    found = truncated_svd(matrix, rank, method=method)
    transposed = truncated_svd(matrix.mT, rank, method=method)
    within = reference.tolerance(matrix)
    if method not in OPTIMAL:
        within["atol"] += 0.1 * reference.discarded(matrix, rank)
    assert error(matrix, found) == pytest.approx(error(matrix.mT, transposed), abs=within["atol"])
    spectrum = reference.singular_values(matrix)
    complete = rank == len(spectrum)
    gap = spectrum[rank - 1] - (0.0 if complete else spectrum[rank])
    if method == "exact" and (complete or gap > 0.05 * spectrum[0]):
        # Within a gap of g, singular subspaces move by error / g.
        within["atol"] *= 40
        assert_close(dense(found), dense(transposed).mT, **within)


@pytest.mark.parametrize("method", METHODS)
@given(matrix=matrices(wide_dtypes))
def test_all_triplets_give_the_matrix_back(method, matrix):
    svd = truncated_svd(matrix, min(matrix.shape), method=method)
    assert_close(dense(svd), matrix, **reference.tolerance(matrix))


@given(
    shape=st.tuples(st.integers(20, 60), st.integers(20, 60)),
    kind=st.sampled_from(["power", "exponential"]),
    decay=st.floats(0.5, 2.0),
    share=st.floats(0.05, 0.6),
    seed=seeds,
)
def test_randomized_error_is_near_the_optimum_on_decaying_spectra(shape, kind, decay, share, seed):
    count = min(shape)
    spectrum = [
        (j + 1) ** -decay if kind == "power" else math.exp(-decay * j / 4) for j in range(count)
    ]
    matrix = matrix_of_spectrum(shape, spectrum, seed)
    rank = max(1, int(share * count))
    svd = randomized_svd(matrix, rank, generator=torch.Generator().manual_seed(seed))
    optimum = reference.frobenius(np.array(spectrum[rank:]))
    assert optimum * (1 - 1e-9) <= error(matrix, svd) <= 1.1 * optimum
    # The energy captured is a lower bound of the optimum's, triplet by triplet.
    assert (reference.array(svd.S) <= np.array(spectrum[:rank]) * (1 + 1e-9)).all()


@given(case=matrices_with_rank(st.just(torch.float64)), seed=seeds)
def test_randomized_squared_error_is_the_norm_less_the_captured_energy(case, seed):
    matrix, rank = case
    svd = randomized_svd(matrix, rank, passes=2, generator=torch.Generator().manual_seed(seed))
    squared = reference.frobenius(matrix) ** 2
    captured = float((reference.array(svd.S) ** 2).sum())
    assert error(matrix, svd) ** 2 == pytest.approx(squared - captured, abs=1e-10 * squared)


def test_randomized_right_vectors_are_those_of_the_matrix_not_of_the_sketch():
    matrix = matrix_of_spectrum((40, 60), [2.0**-j for j in range(40)], seed=0)
    svd = randomized_svd(matrix, 5)
    _, _, Vh = np.linalg.svd(reference.array(matrix))
    cosines = reference.principal_cosines(svd.Vh.mT, torch.from_numpy(Vh[:5].T.copy()))
    assert cosines.min() > 0.999


@given(shape=shapes(), count=st.integers(0, 3), dtype=wide_dtypes, seed=seeds)
def test_randomized_is_exact_once_the_rank_reaches_that_of_the_matrix(shape, count, dtype, seed):
    spectrum = [1.0] * min(count, *shape)
    matrix = matrix_of_spectrum(shape, spectrum, seed).to(dtype)
    svd = randomized_svd(matrix, max(1, len(spectrum)), oversampling=0)
    assert_close(dense(svd), matrix, **reference.tolerance(matrix))


@given(case=matrices_with_rank(dtypes), seed=seeds)
def test_randomized_is_equal_in_every_bit_for_equal_generators(case, seed):
    matrix, rank = case
    first, second = (
        truncated_svd(
            matrix, rank, method="randomized", generator=torch.Generator().manual_seed(seed)
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_global_random_state_is_neither_used_nor_changed(method):
    matrix = matrix_of_spectrum((12, 9), [1.0] * 9, seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = truncated_svd(matrix, 3, method=method)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = truncated_svd(matrix, 3, method=method)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_generator_decides_the_sketch():
    matrix = matrix_of_spectrum((30, 30), [1.0] * 30, seed=0)
    first, second = (
        randomized_svd(matrix, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    assert not torch.allclose(dense(first), dense(second))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_a_rank_out_of_range_is_refused_with_the_range(method, rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 3\].*\(3, 5\), got {rank}"):
        truncated_svd(torch.ones(3, 5), rank, method=method)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"method must be one of auto, exact, gram, .*, got 'fast'"
    ):
        truncated_svd(torch.ones(3, 5), 1, method="fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{"oversampling": -1}, {"passes": 1}])
def test_options_of_the_sketch_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="oversampling must not be negative and passes at least 2"):
        randomized_svd(torch.ones(3, 5), 1, **options)


@given(product=products())
def test_svd_of_product_is_that_of_the_dense_product(product: Product):
    svd = svd_of_product(product.lora_B, product.lora_A)
    expected = torch.from_numpy(reference.lora_delta(product.lora_B, product.lora_A))
    count = min(*product.lora_B.shape, product.lora_A.shape[1])
    assert len(svd.S) == count
    assert_singular_triplets(svd, count)
    assert_canonical_signs(svd)
    # Both sides are factorised, so the error is relative to the product of their norms.
    scale = reference.frobenius(product.lora_B) * reference.frobenius(product.lora_A)
    eps = torch.finfo(svd.S.dtype).eps
    within = reference.Tolerance(rtol=0.0, atol=200 * eps * scale)
    assert_close(dense(svd).double(), expected, **within)
    assert_close(
        svd.S.double(), torch.from_numpy(reference.singular_values(expected)[:count]), **within
    )


def test_svd_of_product_never_forms_the_product():
    lora_B, lora_A = torch.randn(300, 4), torch.randn(4, 500)
    with LargestResult() as largest:
        svd_of_product(lora_B, lora_A)
    assert 0 < largest.entries <= 500 * 4


@given(matrix=matrices())
def test_frobenius_norm_is_exact(matrix):
    assert frobenius_norm(matrix) == pytest.approx(reference.frobenius(matrix), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_frobenius_norm_neither_underflows_nor_overflows(scale):
    matrix = torch.full((700, 900), scale)
    assert frobenius_norm(matrix) == pytest.approx(scale * math.sqrt(630_000), rel=1e-6)


@pytest.mark.parametrize("entries", [(3, 4), (70, 90)])
@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e-160, 1e160, 1e300])
def test_frobenius_norm_of_float64_neither_underflows_nor_overflows(scale, entries):
    matrix = torch.full(entries, scale, dtype=torch.float64)
    assert frobenius_norm(matrix) == pytest.approx(scale * math.sqrt(math.prod(entries)), rel=1e-12)


def test_a_norm_beyond_float64_is_not_called_nan():
    with pytest.raises(ValueError, match="beyond float64's range; scale it down"):
        frobenius_norm(torch.full((9, 9), 1e308, dtype=torch.float64))


SCALES = [
    *((torch.float32, scale) for scale in (1e-44, 1e-41, 1e-38, 1e-30, 1e-16, 1e16, 1e30, 1e38)),
    *((torch.float64, scale) for scale in (1e-300, 1e-155, 1e-17, 1e17, 1e155, 1e300)),
]


def of_scale(dtype: torch.dtype, scale: float) -> torch.Tensor:
    """60 x 50 of norm 2 * scale, or of few entries above it where `scale` is almost nothing."""
    matrix = matrix_of_spectrum((60, 50), [math.sqrt(2) ** -j for j in range(50)], seed=0)
    return (matrix * (60.0 if scale < 1e-40 else 1.0)).mul(scale).to(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_triplets_are_those_of_the_matrix_at_every_scale(method, dtype, scale):
    matrix = of_scale(dtype, scale)
    svd = truncated_svd(matrix, 6, method=method)
    assert_singular_triplets(svd, len(svd.S))
    assert_canonical_signs(svd)
    # Numpy's LAPACK on the matrix scaled in float64, which holds every float32.
    reach = matrix.double() / scale
    expected = reference.singular_values(reach)[: len(svd.S)]
    found = reference.array(svd.S.double() / scale)
    # S is rounded to the nearest subnormal number.
    near = 1e-4 * expected[0] + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / scale
    assert np.abs(found - expected).max() <= near
    assert svd.norm / scale == pytest.approx(reference.frobenius(reach), rel=1e-6)
    approximation = reference.array(svd.U) * found @ reference.array(svd.Vh)
    lost = reference.frobenius(reference.array(reach) - approximation)
    assert lost <= 1.05 * reference.discarded(reach, len(svd.S)) + 3 * near


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_products_have_finite_triplets_at_every_scale(dtype, scale):
    left, right = of_scale(dtype, scale)[:, :5], of_scale(torch.float64, 1.0).to(dtype)[:5]
    svd = svd_of_product(left, right)
    assert_singular_triplets(svd, 5)
    expected = reference.singular_values((left.double() / scale) @ right.double())[0]
    assert float(svd.S[0].double() / scale) == pytest.approx(expected, rel=0.2)
    assert svd.norm / scale == pytest.approx(expected, rel=1.0)


def test_a_product_with_a_column_of_almost_nothing_has_finite_triplets():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, 3, generator=generator) * torch.tensor([1.0, 1.0, 1e-41])
    svd = svd_of_product(left, torch.randn(3, 20, generator=generator))
    assert_singular_triplets(svd, 3)


@pytest.mark.parametrize("method", METHODS)
def test_singular_values_beyond_the_dtype_are_refused(method):
    with pytest.raises(ValueError, match=r"beyond the range of torch.float32.* pass it in float64"):
        truncated_svd(torch.full((60, 70), 1e38), 1, method=method)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_energy_and_stable_rank_hold_at_every_scale(scale):
    S = torch.tensor([2.0, 1.0], dtype=torch.float64) * scale
    norm = frobenius_norm(S)
    assert energy(S[:1], norm) == pytest.approx(0.8)
    assert stable_rank(S, norm) == pytest.approx(1.25)
    assert [rank_for_energy(S, norm, share) for share in (0.79, 0.81, 1.0)] == [1, 2, 2]


@pytest.mark.parametrize("defect", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_is_not_finite_is_refused(method, defect):
    matrix = torch.ones(60, 70)
    matrix[3, 5] = defect
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        truncated_svd(matrix, 2, method=method)


def test_frobenius_norm_of_many_entries_does_not_lose_digits():
    matrix = torch.full((1500, 1500), 0.1)
    expected = 1500 * float(matrix[0, 0])
    assert frobenius_norm(matrix) == pytest.approx(expected, rel=1e-6)
    assert frobenius_norm(matrix.mT[:, 1:]) == pytest.approx(
        expected * math.sqrt(1499 / 1500), rel=1e-6
    )
    drawn = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0))
    assert frobenius_norm(drawn) == pytest.approx(reference.frobenius(drawn), rel=1e-8)


@given(case=matrices_with_rank(st.just(torch.float64)))
def test_energy_and_relative_error_say_what_a_truncation_loses(case):
    matrix, rank = case
    norm = frobenius_norm(matrix)
    S = torch.from_numpy(reference.singular_values(matrix)[:rank].copy())
    assert 0 <= energy(S, norm) <= 1
    assert relative_error(S, norm) ** 2 + energy(S, norm) == pytest.approx(1.0)
    if norm:
        assert relative_error(S, norm) == pytest.approx(
            reference.discarded(matrix, rank) / norm, abs=1e-7
        )


def test_ninety_five_percent_energy_is_twenty_two_percent_error():
    assert relative_error(torch.tensor([math.sqrt(0.95)]), 1.0) == pytest.approx(
        math.sqrt(0.05), rel=1e-6
    )


@given(matrix=matrices(st.just(torch.float64)))
def test_stable_rank_lies_between_one_and_the_rank(matrix):
    S = torch.from_numpy(reference.singular_values(matrix).copy())
    norm = frobenius_norm(matrix)
    found = stable_rank(S, norm)
    if norm == 0:
        assert found == 0
    else:
        assert 1 - 1e-9 <= found <= np.linalg.matrix_rank(reference.array(matrix)) + 1e-9
        # Held values may be fewer: only the first and the norm count.
        assert found == stable_rank(S[:1], norm)


@given(matrix=matrices(st.just(torch.float64)), share=st.floats(0.01, 0.999))
def test_rank_for_energy_is_the_smallest_that_reaches_the_share(matrix, share):
    S = torch.from_numpy(reference.singular_values(matrix).copy())
    norm = frobenius_norm(matrix)
    rank = rank_for_energy(S, norm, share)
    assert rank is not None
    assert energy(S[:rank], norm) >= share * (1 - 2e-6)
    if rank > 0:
        assert norm == 0 or energy(S[: rank - 1], norm) < share


def test_rank_for_energy_of_a_zero_matrix_is_zero():
    assert rank_for_energy(torch.zeros(3), 0.0, 0.9) == 0


def test_rank_for_energy_is_none_if_too_few_triplets_are_held():
    assert rank_for_energy(torch.tensor([3.0, 2.0]), 5.0, 0.9) is None


def test_all_energy_is_reached_by_all_triplets_in_float32():
    for seed in range(8):
        matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(seed))
        S = truncated_svd(matrix, 50).S
        assert rank_for_energy(S, frobenius_norm(matrix), 1.0) == 50


@pytest.mark.parametrize("error", [1e-2, 1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slack_is_a_hundredth_of_what_may_be_lost(error, dtype):
    # Of 100 equal small values, as many may be lost as make up the error.
    tail = [error / 4] * 100
    S = torch.tensor([1.0, *tail], dtype=dtype)
    norm = math.hypot(1.0, *tail)
    lost = 101 - (rank_for_energy(S, norm, 1 - error**2) or 0)
    if dtype == torch.float64 or error >= 1e-3:
        assert lost in (15, 16)
        assert math.hypot(*tail[:lost]) <= error * norm * (1 + 1e-2)


def test_all_energy_of_float64_values_is_more_than_float32_can_tell():
    S = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    norm = math.hypot(1.0, 1e-4)
    assert rank_for_energy(S, norm, 1.0) == 2
    assert rank_for_energy(S.float(), norm, 1.0) == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        rank_for_energy(torch.ones(2), 2.0, share)
