"""Krylov spaces, adaptive ranks, the choice of a method and the tracker, by the laws they state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.allocations import LargestResult
from support.strategies import (
    matrices,
    matrix_of_spectrum,
    orthonormal,
    seeds,
    spectra,
    wide_dtypes,
)
from torch.testing import assert_close

from peft_svdinit.linalg import adaptive, krylov_svd, truncated_svd
from peft_svdinit.linalg.adaptive import adaptive_svd
from peft_svdinit.linalg.gram import gram_subspace_svd, gram_svd
from peft_svdinit.linalg.orthonormal import orthonormal_basis
from peft_svdinit.linalg.randomized import randomized_svd
from peft_svdinit.linalg.tracker import SubspaceTracker
from peft_svdinit.linalg.truncated import cheapest_method

POLYNOMIAL = [1 / (1 + j) for j in range(120)]


def error(matrix: torch.Tensor, svd) -> float:
    dense = reference.array(svd.U) * reference.array(svd.S) @ reference.array(svd.Vh)
    return reference.frobenius(reference.array(matrix) - dense)


def error_ratio(matrix: torch.Tensor, svd) -> float:
    return error(matrix, svd) / reference.discarded(matrix, len(svd.S))


@given(
    rows=st.integers(3, 30),
    held=st.integers(0, 8),
    new=st.integers(1, 8),
    spectrum=spectra(8),
    dtype=wide_dtypes,
    seed=seeds,
)
def test_a_basis_is_orthonormal_and_spans_what_is_new(rows, held, new, spectrum, dtype, seed):
    held, new = min(held, rows - 1), min(new, rows - min(held, rows - 1))
    generator = torch.Generator().manual_seed(seed)
    against = orthonormal(rows, held, generator).to(dtype) if held else None
    columns = torch.randn(rows, new, generator=generator, dtype=torch.float64)
    columns = (columns * torch.tensor(spectrum[:new], dtype=torch.float64)).to(dtype)
    basis = orthonormal_basis(columns, against)
    near = 1e-5 if dtype == torch.float32 else 1e-13
    assert_close(basis.mT @ basis, torch.eye(new, dtype=dtype), rtol=0, atol=near)
    whole = basis
    if against is not None:
        assert_close(against.mT @ basis, torch.zeros(held, new, dtype=dtype), rtol=0, atol=near)
        whole = torch.cat([against, basis], dim=1)
    left = columns - whole @ (whole.mT @ columns)
    assert float(left.norm()) <= 30 * near * float(columns.norm())


@pytest.mark.parametrize("columns", [torch.zeros(9, 3), torch.ones(9, 3), torch.eye(9)[:, :3]])
def test_a_block_that_adds_nothing_is_filled_with_orthonormal_columns(columns):
    against = torch.eye(9)[:, :4]
    whole = torch.cat([against, orthonormal_basis(columns, against)], dim=1)
    assert_close(whole.mT @ whole, torch.eye(7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", range(2, 9))
@given(matrix=matrices(st.just(torch.float64), largest=40), block=st.integers(1, 8), seed=seeds)
def test_the_error_of_a_krylov_space_is_the_norm_less_the_captured_energy(
    passes, matrix, block, seed
):
    rank = min(block * (passes // 2), *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    svd = krylov_svd(matrix, rank, block=block, passes=passes, generator=generator)
    squared = svd.norm**2 - float(svd.S.square().sum())
    assert error(matrix, svd) ** 2 == pytest.approx(squared, abs=1e-9 * svd.norm**2)
    slack = reference.tolerance(matrix)["atol"]
    assert (reference.array(svd.S) <= reference.singular_values(matrix)[:rank] + slack).all()


@given(matrix=matrices(wide_dtypes, largest=40), seed=seeds)
def test_a_krylov_space_that_fills_the_matrix_is_exact(matrix, seed):
    rank = min(matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    svd = krylov_svd(matrix, rank, block=4, passes=2 * -(-rank // 4) + 4, generator=generator)
    assert error(matrix, svd) <= reference.tolerance(matrix)["atol"]


def test_more_passes_never_lose_and_beat_power_iteration():
    matrix = matrix_of_spectrum((150, 120), POLYNOMIAL, seed=3).float()
    errors = [error_ratio(matrix, krylov_svd(matrix, 16, passes=p)) for p in (4, 6, 8)]
    assert errors[0] > errors[1] > errors[2] >= 1 - 1e-6
    assert errors[1] < 1.01
    powered = error_ratio(matrix, randomized_svd(matrix, 16, oversampling=0, passes=6))
    assert errors[1] < powered


def test_odd_and_even_passes_serve_both_orientations():
    matrix = matrix_of_spectrum((150, 120), POLYNOMIAL, seed=4).float()
    for passes in (4, 5):
        for oriented in (matrix, matrix.mT):
            assert error_ratio(oriented, krylov_svd(oriented, 16, passes=passes)) < 1.05


@pytest.mark.parametrize("options", [{"passes": 1}, {"block": 0}, {"block": 2, "passes": 4}])
def test_passes_that_do_not_span_the_rank_are_refused(options):
    with pytest.raises(ValueError, match=r"passes=.* directions, rank=9 needs as many"):
        krylov_svd(torch.ones(40, 30), 9, **options)


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (60, 60)])
def test_gram_is_the_optimum_of_float32_data_down_to_small_singular_values(shape):
    spectrum = [10.0 ** (-j / 6) for j in range(30)]
    matrix = matrix_of_spectrum(shape, spectrum, seed=0).float()
    found = gram_svd(matrix, 24)
    assert found.optimal
    expected = torch.from_numpy(reference.singular_values(matrix)[:24].copy())
    assert_close(found.S.double(), expected, rtol=0, atol=2e-7)
    assert_close(found.U.mT @ found.U, torch.eye(24), rtol=0, atol=1e-5)
    assert_close(found.Vh @ found.Vh.mT, torch.eye(24), rtol=0, atol=1e-5)


def test_gram_makes_no_wide_copy_of_the_matrix():
    matrix = torch.randn(20_000, 8)
    with LargestResult() as largest:
        gram_svd(matrix, 2)
    # The float32 matrix is the input itself; the largest result is the run of its norm.
    assert largest.entries <= 20_000 * 8


@pytest.mark.parametrize("options", [{"oversampling": -1}, {"iterations": 0}])
def test_options_of_the_gram_iteration_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="oversampling must not be negative and iterations"):
        gram_subspace_svd(torch.ones(5, 3), 1, **options)


@pytest.mark.parametrize("shape", [(96, 400), (400, 96), (100, 100)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_an_adaptive_rank_certifies_its_energy_with_few_triplets_too_many(shape, share):
    spectrum = [1 / (1 + j) ** 1.5 for j in range(96)]
    matrix = matrix_of_spectrum(shape, spectrum, seed=1).float()
    found = adaptive_svd(matrix, energy=share)
    captured = np.cumsum(np.square(spectrum)) / np.square(spectrum).sum()
    least = int(np.argmax(captured >= share * (1 - 1e-6))) + 1
    assert found.energy >= share * (1 - 2e-6)
    assert least <= len(found.S) <= math.ceil(1.1 * least)
    assert error(matrix, found) <= math.sqrt(1 - share) * found.norm * (1 + 1e-3) + 1e-3


def test_an_adaptive_rank_stops_before_a_full_factorisation(monkeypatch):
    monkeypatch.setattr(adaptive, "gram_svd", None)
    matrix = matrix_of_spectrum((600, 500), [2.0**-j for j in range(500)], seed=0).float()
    assert len(adaptive_svd(matrix, energy=0.99).S) == 4


@pytest.mark.parametrize(("cap", "smaller"), [(16, 256), (31, 256), (32, 256), (100, 640)])
def test_a_cap_between_whole_blocks_needs_no_full_factorisation(monkeypatch, cap, smaller):
    monkeypatch.setattr(adaptive, "gram_svd", None)
    matrix = torch.randn(smaller + 20, smaller, generator=torch.Generator().manual_seed(0))
    assert len(adaptive_svd(matrix, energy=0.99, max_rank=cap).S) == cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [0.0, 1e-5, 5e-4, 1e-3, 3e-3])
def test_a_small_error_is_met_or_refused(asked, dtype):
    spectrum = [1.0] * 4 + [5e-5] * 196
    matrix = matrix_of_spectrum((210, 200), spectrum, seed=0).to(dtype)
    if 0 < asked < 1e-3 and dtype == torch.float32:
        with pytest.raises(ValueError, match=r"error=.* resolution of float32 .* at least 0.001"):
            truncated_svd(matrix, error=asked)
        return
    found = truncated_svd(matrix, error=asked)
    if asked or dtype == torch.float64:
        assert error(matrix, found) <= asked * found.norm * 1.01 + 1e-6
    assert (len(found.S) == 4) == (asked >= 4e-4 or (not asked and dtype == torch.float32))


@pytest.mark.parametrize("asked", [1e-3, 2e-3])
def test_the_least_error_of_float32_is_met(asked):
    matrix = matrix_of_spectrum((210, 200), [1.0] * 4 + [5e-4] * 196, seed=0).float()
    found = truncated_svd(matrix, error=asked)
    assert 0.8 * asked <= error(matrix, found) / found.norm <= 1.05 * asked
    assert found.relative_error <= 1.05 * asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_energy_beyond_float32_is_refused_and_all_energy_is_not(dtype):
    matrix = torch.eye(60, dtype=dtype)
    with pytest.raises(ValueError, match=r"energy=0.9999999 .* resolution of float32 .* 0.999999,"):
        truncated_svd(matrix, energy=0.9999999)
    assert len(truncated_svd(matrix, energy=1 - 1e-6).S) == 60
    assert len(truncated_svd(matrix, energy=1.0).S) == 60
    assert len(truncated_svd(matrix.double(), energy=0.9999999).S) == 60


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, -136), (torch.float32, 120), (torch.float64, -997), (torch.float64, 997)],
)
@pytest.mark.parametrize("share", [0.9, 0.9999])
def test_an_adaptive_rank_is_the_same_at_every_scale(share, dtype, exponent):
    matrix = matrix_of_spectrum((300, 290), [1 / (1 + j) ** 2 for j in range(290)], seed=0)
    scaled = (matrix * 2.0**exponent).to(dtype)
    # The same entries, those rounded to subnormal numbers included.
    usual = adaptive_svd((scaled.double() * 2.0**-exponent).to(dtype), energy=share)
    found = adaptive_svd(scaled, energy=share)
    assert found.norm * 2.0**-exponent == pytest.approx(usual.norm)
    assert_close(found.U, usual.U, rtol=0, atol=1e-5)
    assert_close(found.Vh, usual.Vh, rtol=0, atol=1e-5)
    assert_close(found.S.double() * 2.0**-exponent, usual.S.double(), rtol=1e-5, atol=1e-3)


def test_energy_and_error_are_two_words_for_one_target():
    matrix = matrix_of_spectrum((90, 80), POLYNOMIAL[:80], seed=2)
    by_error = adaptive_svd(matrix, error=0.1)
    assert by_error.relative_error <= 0.1
    assert len(adaptive_svd(matrix, energy=1 - 0.1**2).S) == len(by_error.S)
    assert len(truncated_svd(matrix, error=0.1).S) == len(by_error.S)


def test_an_adaptive_rank_keeps_to_its_cap_and_says_what_it_holds():
    matrix = torch.randn(90, 80, generator=torch.Generator().manual_seed(0))
    found = truncated_svd(matrix, 5, energy=0.99)
    assert len(found.S) == 5
    assert found.energy < 0.5


def test_a_zero_matrix_has_one_triplet_of_nothing():
    found = adaptive_svd(torch.zeros(70, 60), energy=0.9)
    assert (len(found.S), float(found.S[0]), found.energy) == (1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank, or an energy"),
        ({"energy": 0.5, "error": 0.5}, "give either energy or error"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
        ({"energy": math.nan}, r"energy must be in \(0, 1\]"),
        ({"error": 1.0}, r"error must be in \[0, 1\), got 1.0"),
        ({"energy": 0.5, "method": "gram"}, 'energy and error need method="auto"'),
        ({"rank": 2, "tolerance": 0.9}, "tolerance must be at least 1, got 0.9"),
        ({"rank": 2, "tolerance": math.nan}, "tolerance must be at least 1"),
    ],
)
def test_targets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(torch.ones(6, 5), **options)


@pytest.mark.parametrize(
    ("shape", "rank", "tolerance", "method"),
    [
        ((32, 4096), 8, 1.01, "exact"),
        ((576, 576), 16, 1.01, "krylov"),
        ((2048, 2048), 64, 1.1, "krylov"),
        ((4096, 4096), 16, 1.2, "krylov"),
        ((576, 576), 400, 1.01, "gram"),
        ((576, 576), 16, 1.0, "gram"),
        ((100_000, 256), 64, 1.01, "gram_subspace"),
    ],
)
def test_the_method_follows_from_shape_rank_and_error(shape, rank, tolerance, method):
    assert cheapest_method(shape, rank, tolerance) == method
    assert cheapest_method(shape[::-1], rank, tolerance) == method


@pytest.mark.parametrize("tolerance", [1.1, 1.05, 1.01, 1.001, 1.0])
@pytest.mark.parametrize("rank", [1, 5, 16, 40])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_auto_comes_within_its_tolerance_on_polynomial_spectra(tolerance, rank, decay):
    spectrum = [(1 + j) ** -decay for j in range(180)]
    matrix = matrix_of_spectrum((240, 180), spectrum, seed=5)
    found = truncated_svd(matrix, rank, tolerance=tolerance)
    assert 1 - 1e-9 <= error_ratio(matrix, found) <= tolerance + 1e-6


def test_the_certificate_is_the_error_that_was_made():
    matrix = torch.randn(130, 110, generator=torch.Generator().manual_seed(2))
    for method in ("exact", "gram", "gram_subspace", "randomized", "krylov"):
        found = truncated_svd(matrix, 9, method=method)
        assert found.optimal == (method in ("exact", "gram"))
        assert found.relative_error * found.norm == pytest.approx(error(matrix, found), rel=1e-5)
        assert found.energy == pytest.approx(1 - found.relative_error**2)


def drifting(step: int, seed: int = 0) -> torch.Tensor:
    """A slowly turning low-rank signal in noise, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    left, right = orthonormal(80, 6, generator), orthonormal(60, 6, generator)
    turn = orthonormal(80, 6, generator)
    signal = ((left + 0.01 * step * turn) * torch.tensor([6.0, 5, 4, 3, 2, 1.5])) @ right.mT
    noise = torch.Generator().manual_seed(seed + 100 + step)
    return (signal + 0.2 * torch.randn(80, 60, generator=noise, dtype=torch.float64)).float()


def test_a_tracker_follows_a_running_mean_near_its_optimum():
    tracker = SubspaceTracker(4, decay=0.9)
    mean = torch.zeros(80, 60)
    for step in range(30):
        matrix = drifting(step)
        mean = matrix if step == 0 else 0.9 * mean + 0.1 * matrix
        found = tracker.update(matrix)
        assert found.norm == pytest.approx(float(mean.norm()), rel=1e-5)
        assert error_ratio(mean, found) < 1.01


def test_a_tracker_without_decay_follows_the_matrices_and_stores_no_mean():
    tracker = SubspaceTracker(4, decay=0.0)
    for step in range(5):
        found = tracker.update(drifting(step))
    assert found.norm == pytest.approx(float(drifting(4).norm()), rel=1e-5)
    assert list(tracker.state_dict()) == ["block"]


def test_a_tracker_goes_on_from_its_state_bit_by_bit():
    whole, first = SubspaceTracker(4), SubspaceTracker(4)
    for step in range(3):
        whole.update(drifting(step))
        first.update(drifting(step))
    resumed = SubspaceTracker(4)
    resumed.load_state_dict(first.state_dict())
    expected, found = whole.update(drifting(3)), resumed.update(drifting(3))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_tracker_keeps_no_tensor_of_the_caller(decay):
    reused, whole = SubspaceTracker(4, decay=decay), SubspaceTracker(4, decay=decay)
    gradient = drifting(0)
    reused.update(gradient)
    gradient.zero_()
    whole.update(drifting(0))
    expected, found = whole.update(drifting(1)), reused.update(drifting(1))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_state_of_a_tracker_is_a_copy_both_ways():
    whole, tracker, resumed = (SubspaceTracker(4) for _ in range(3))
    whole.update(drifting(0))
    tracker.update(drifting(0))
    state = tracker.state_dict()
    resumed.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    expected = whole.update(drifting(1))
    for copied in (tracker, resumed):
        found = copied.update(drifting(1))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e30, 1e37])
def test_a_tracker_follows_matrices_of_every_scale(scale):
    usual, scaled = SubspaceTracker(4), SubspaceTracker(4)
    for step in range(3):
        expected, found = usual.update(drifting(step)), scaled.update(drifting(step) * scale)
        assert_close(found.S.double() / scale, expected.S.double(), rtol=1e-3, atol=0)
        assert_close(found.Vh @ found.Vh.mT, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": torch.ones(1)}, r"has \['block', 'mean'\], got \['block', 'mean', 'rank'\]"),
        ({"mean": None}, r"got \['block'\]"),
        ({"block": None}, r"got \['mean'\]"),
        ({"mean": torch.ones(80, 59)}, r"mean \(80, 59\) and block \(60, 12\)"),
        ({"mean": torch.ones(60)}, r"mean \(60,\)"),
        ({"block": torch.ones(60, 11)}, r"rank=4, oversampling=8 .*block \(60, 11\)"),
        ({"block": torch.ones(12)}, r"block \(12,\)"),
        ({"mean": torch.full((80, 60), math.inf)}, "NaN or infinite"),
    ],
)
def test_a_tracker_refuses_the_state_of_another(change, message):
    tracker = SubspaceTracker(4)
    tracker.update(drifting(0))
    before = tracker.state_dict()
    state = {name: tensor for name, tensor in {**before, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        tracker.load_state_dict(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in tracker.state_dict().items())


def test_a_tracker_without_decay_takes_its_own_state_alone():
    tracker = SubspaceTracker(4, decay=0.0)
    tracker.update(drifting(0))
    resumed = SubspaceTracker(4, decay=0.0)
    resumed.load_state_dict(tracker.state_dict())
    assert torch.equal(resumed.state_dict()["block"], tracker.state_dict()["block"])
    for width in (3, 13):
        with pytest.raises(ValueError, match=rf"block \(60, {width}\)"):
            resumed.load_state_dict({"block": torch.ones(60, width)})
    resumed.load_state_dict({})
    assert resumed.state_dict() == {}


def test_a_tracker_refuses_what_it_cannot_follow_and_keeps_its_state():
    tracker = SubspaceTracker(4)
    tracker.update(drifting(0))
    before = {name: tensor.clone() for name, tensor in tracker.state_dict().items()}
    with pytest.raises(ValueError, match="matrix must keep its 60 columns"):
        tracker.update(torch.ones(80, 50))
    with pytest.raises(ValueError, match=r"matrix must keep the shape \(80, 60\)"):
        tracker.update(torch.ones(70, 60))
    with pytest.raises(ValueError, match="NaN or infinite"):
        tracker.update(torch.full((80, 60), math.nan))
    assert all(torch.equal(before[name], tensor) for name, tensor in tracker.state_dict().items())
    with pytest.raises(ValueError, match="rank must be in"):
        SubspaceTracker(99).update(drifting(0))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        SubspaceTracker(4, decay=1.0)
    with pytest.raises(ValueError, match="oversampling must not be negative"):
        SubspaceTracker(4, oversampling=-1)
