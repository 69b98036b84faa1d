"""LowRankFactors: a delta's triplets beside its exact norm."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.allocations import LargestResult
from support.strategies import (
    Product,
    layer_factors,
    matrices_with_rank,
    matrix_of_spectrum,
    products,
    wide_dtypes,
)
from torch.testing import assert_close

from peft_svdinit import LowRankFactors

METHODS = ("exact", "randomized")


@pytest.mark.parametrize("method", METHODS)
@given(case=matrices_with_rank())
def test_the_norm_is_that_of_the_whole_delta_however_few_triplets_are_held(method, case):
    delta, rank = case
    factors = LowRankFactors.from_delta(delta, rank, method=method)
    assert (factors.rank, factors.shape) == (rank, tuple(delta.shape))
    assert factors.norm == pytest.approx(reference.frobenius(delta), rel=1e-12)
    assert factors.truncated(1).norm == factors.norm


@given(case=matrices_with_rank(wide_dtypes))
def test_energy_and_error_are_those_of_the_dense_truncation(case):
    delta, rank = case
    factors = LowRankFactors.from_delta(delta, rank)
    norm = reference.frobenius(delta)
    for kept in range(1, rank + 1):
        lost = reference.frobenius(
            reference.array(delta) - reference.array(factors.truncated(kept).dense())
        )
        # The square root of 1 - energy magnifies the rounding of the energy.
        assert factors.relative_error(kept) == pytest.approx(lost / norm if norm else 0, abs=3e-3)
        assert factors.relative_error(kept) ** 2 + factors.energy(kept) == pytest.approx(1)


@given(factors=layer_factors())
def test_energy_grows_with_the_rank_and_is_all_that_is_held_by_default(factors):
    shares = [factors.energy(rank) for rank in range(1, factors.rank + 1)]
    # Sums of different length round differently in the last place.
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(shares))
    assert 0 <= shares[0] and shares[-1] <= 1
    assert factors.energy() == shares[-1]
    assert factors.truncated(1).energy() == shares[0]
    assert factors.relative_error() == factors.relative_error(factors.rank)


@given(factors=layer_factors(), data=st.data())
def test_truncating_keeps_the_leading_triplets(factors, data):
    rank = data.draw(st.integers(1, factors.rank))
    kept = factors.truncated(rank)
    assert torch.equal(kept.S, factors.S[:rank])
    assert torch.equal(kept.U, factors.U[:, :rank])
    assert torch.equal(kept.Vh, factors.Vh[:rank])


@given(product=products(), scaling=st.sampled_from([0.0, 0.5, 1.0, 16.0]))
def test_factors_of_a_product_are_those_of_the_dense_delta(product: Product, scaling):
    factors = LowRankFactors.from_product(product.lora_B, product.lora_A, scaling)
    delta = torch.from_numpy(reference.lora_delta(product.lora_B, product.lora_A, scaling))
    assert factors.shape == tuple(delta.shape)
    assert factors.rank == min(*product.lora_B.shape, product.lora_A.shape[1])
    scale = scaling * reference.frobenius(product.lora_B) * reference.frobenius(product.lora_A)
    within = 200 * torch.finfo(factors.S.dtype).eps * scale
    assert_close(factors.dense().double(), delta, rtol=0.0, atol=within)
    assert factors.norm == pytest.approx(reference.frobenius(delta), abs=within)
    assert factors.energy() == pytest.approx(1.0)


def test_factors_of_a_product_never_form_it():
    lora_B, lora_A = torch.randn(300, 4), torch.randn(4, 500)
    with LargestResult() as largest:
        LowRankFactors.from_product(lora_B, lora_A, 2.0)
    assert 0 < largest.entries <= 500 * 4


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_delta_loses_nothing(method):
    factors = LowRankFactors.from_delta(torch.zeros(5, 3), 2, method=method)
    assert (factors.norm, factors.energy(), factors.relative_error()) == (0.0, 1.0, 0.0)
    assert torch.equal(factors.dense(), torch.zeros(5, 3))


def test_an_untrained_adapter_has_factors_of_a_zero_delta():
    factors = LowRankFactors.from_product(torch.zeros(5, 2), torch.randn(2, 4))
    assert (factors.norm, factors.energy()) == (0.0, 1.0)
    assert torch.isfinite(factors.U).all()


def test_the_rank_is_capped_by_the_smaller_side():
    assert LowRankFactors.from_delta(torch.randn(7, 3), 64).rank == 3


def test_a_flat_delta_at_half_its_rank_holds_half_its_energy():
    delta = matrix_of_spectrum((8, 8), [1.0] * 8, seed=0)
    factors = LowRankFactors.from_delta(delta, 4)
    assert factors.energy() == pytest.approx(0.5)
    assert factors.relative_error() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_truncating_out_of_range_is_refused_with_the_range(rank):
    factors = LowRankFactors.from_delta(torch.randn(6, 5), 3)
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 3\], the rank held, got {rank}"):
        factors.truncated(rank)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in .*got 0"):
        LowRankFactors.from_delta(torch.randn(6, 5), 0)


@pytest.mark.parametrize("scaling", [-1.0, math.nan, math.inf])
def test_a_scaling_that_is_negative_or_not_finite_is_refused(scaling):
    with pytest.raises(ValueError, match=f"scaling must be finite and not negative, got {scaling}"):
        LowRankFactors.from_product(torch.ones(3, 1), torch.ones(1, 2), scaling)


def test_the_fields_cannot_be_replaced():
    factors = LowRankFactors.from_delta(torch.randn(6, 5), 3)
    with pytest.raises(AttributeError):
        factors.norm = 0.0  # pyright: ignore[reportAttributeAccessIssue]
