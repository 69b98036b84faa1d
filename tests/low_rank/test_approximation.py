"""A weight as a product: the optimum by entries, the optimum by outputs, rows weighed by size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.strategies import matrices_with_rank, matrix_of_spectrum, seeds
from torch import Tensor

from peft_svdinit.low_rank.approximation import Approximation, approximation

# The largest error of the iterative SVDs over the optimum.
SLACK = 1.002


def product(found: Approximation) -> np.ndarray:
    U, S, Vh = (reference.array(each) for each in (found.U, found.S, found.Vh))
    dense = U @ np.diag(S) @ Vh
    return dense if found.D is None else reference.array(found.D)[:, None] * dense


def moments_of(size: int, seed: int, decay: float) -> Tensor:
    """Second moments of inputs that hardly have some directions."""
    spectrum = [10.0 ** (-decay * j) for j in range(size)]
    root = matrix_of_spectrum((size, size), spectrum, seed)
    return (root @ root.mT).float()


def damped(moments: Tensor) -> np.ndarray:
    C = reference.array(moments)
    return C + 0.01 * np.trace(C) / len(C) * np.eye(len(C))


def output_error(difference: np.ndarray, C: np.ndarray) -> float:
    """E‖(W − W')x‖², from its definition."""
    return float(np.trace(difference @ C @ difference.T))


def optimum(weight: np.ndarray, C: np.ndarray, rank: int) -> float:
    """The least E‖(W − W')x‖² of a rank: what the SVD of W C^½ discards."""
    values, vectors = np.linalg.eigh(C)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    return float((np.linalg.svd(weight @ root, compute_uv=False)[rank:] ** 2).sum())


@given(case=matrices_with_rank(st.just(torch.float32)))
def test_by_entries_it_is_the_best_of_its_rank(case):
    weight, rank = case
    found = approximation(weight, rank)
    norm = reference.frobenius(weight)
    lost = reference.frobenius(reference.array(weight) - product(found))
    assert found.D is None and len(found.S) == rank
    assert lost <= SLACK * reference.discarded(weight, rank) + 1e-5 * norm
    assert found.error == pytest.approx(lost / norm if norm else 0.0, rel=1e-3, abs=1e-5)


def test_by_entries_a_matrix_too_large_for_a_whole_svd_is_near_its_optimum():
    weight = matrix_of_spectrum((150, 120), [1 / (1 + j) for j in range(120)], 0).float()
    found = approximation(weight, 4)
    assert found.error * reference.frobenius(weight) <= SLACK * reference.discarded(weight, 4)


@given(case=matrices_with_rank(st.just(torch.float32)), seed=seeds, decay=st.floats(0.0, 1.0))
def test_by_outputs_no_other_product_of_its_rank_is_nearer(case, seed, decay):
    weight, rank = case
    moments = moments_of(weight.shape[1], seed, decay)
    C, W = damped(moments), reference.array(weight)
    found = approximation(weight, rank, moments=moments)
    error, size = output_error(W - product(found), C), output_error(W, C)
    assert error <= SLACK * optimum(W, C, rank) + 1e-9 * size
    assert error <= SLACK * output_error(W - reference.truncated(weight, rank), C) + 1e-9 * size
    lost = reference.frobenius(W - product(found))
    assert found.error == pytest.approx(lost / (reference.frobenius(W) or 1), rel=1e-3, abs=1e-5)


def test_by_outputs_an_unused_direction_is_given_up_and_plain_svd_would_keep_it():
    weight = torch.diag(torch.tensor([10.0, 1.0]))
    moments = torch.diag(torch.tensor([0.0, 1.0]))
    kept = product(approximation(weight, 1, moments=moments))
    # 100 times the damping of 0.005 is less than 1.
    assert np.allclose(kept, np.diag([0.0, 1.0]), atol=1e-5)
    assert np.allclose(product(approximation(weight, 1)), np.diag([10.0, 0.0]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_not_changed(dtype):
    moments = moments_of(5, 0, 0.5).to(dtype)
    before = moments.clone()
    approximation(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), 2, moments=moments)
    assert torch.equal(moments, before)


def test_inputs_that_are_all_zero_count_alike():
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = approximation(weight, 2, moments=torch.zeros(5, 5))
    assert np.allclose(product(found), reference.truncated(weight, 2), atol=1e-5)


def row_sizes(weight: np.ndarray, kind: str) -> list[float]:
    """D from its definition, row by row."""
    sizes = []
    for row in weight:
        norm = float(np.sqrt((row**2).sum())) or 1.0
        total = float(row.sum())
        sizes.append(total if kind == "sums" and abs(total) >= 0.05 * norm else norm)
    return sizes


@st.composite
def rows_of_all_sizes(draw: st.DrawFn) -> Tensor:
    """Rows of zeros, rows whose sums cancel and rows of sizes far apart, among random ones."""
    count, inner = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(count, inner, generator=generator)
    weight *= torch.tensor([draw(st.sampled_from([1e-3, 1.0, 1e3])) for _ in range(count)])[:, None]
    kinds = [draw(st.sampled_from(["random", "zero", "cancelling"])) for _ in range(count)]
    for row, kind in enumerate(kinds):
        if kind == "zero":
            weight[row] = 0
        elif kind == "cancelling":
            weight[row] -= weight[row].mean()
    return weight


@given(
    weight=rows_of_all_sizes(),
    kind=st.sampled_from(["norms", "sums"]),
    by_outputs=st.booleans(),
    data=st.data(),
)
def test_normalised_rows_are_approximated_in_place_of_the_rows(weight, kind, by_outputs, data):
    rank = data.draw(st.integers(1, min(weight.shape)))
    moments = moments_of(weight.shape[1], 1, 0.5) if by_outputs else None
    found = approximation(weight, rank, moments=moments, row_normalise=kind)
    assert found.D is not None and bool(torch.isfinite(found.D).all()) and bool(found.D.all())
    D = np.array(row_sizes(reference.array(weight), kind))
    unsure = np.isclose(
        np.abs(reference.array(weight).sum(1)),
        0.05 * np.linalg.norm(reference.array(weight), axis=1),
        rtol=1e-2,
    )
    assert np.allclose(reference.array(found.D)[~unsure], D[~unsure], rtol=1e-4)
    D = reference.array(found.D)
    scaled, approximated = reference.array(weight) / D[:, None], product(found) / D[:, None]
    C = np.eye(weight.shape[1]) if moments is None else damped(moments)
    error, size = output_error(scaled - approximated, C), output_error(scaled, C)
    assert error <= SLACK * optimum(scaled, C, rank) + 1e-8 * size
    lost = reference.frobenius(reference.array(weight) - product(found))
    norm = reference.frobenius(weight)
    assert found.error == pytest.approx(lost / norm if norm else 0.0, rel=1e-3, abs=1e-4)


def test_a_sum_near_zero_is_replaced_by_the_norm_and_a_negative_one_stays():
    weight = torch.tensor([[3.0, -3.0], [3.0, -2.8], [-3.0, -1.0], [3.0, -2.7], [0.0, 0.0]])
    D = approximation(weight, 1, row_normalise="sums").D
    expected = [18**0.5, (9 + 2.8**2) ** 0.5, -4.0, 0.3, 1.0]
    assert D is not None and D.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "norms", "sums"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_one_row_or_column_is_exact(kind, shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    for moments in (None, moments_of(shape[1], 0, 0.2)):
        found = approximation(weight, 1, moments=moments, row_normalise=kind)
        assert np.allclose(product(found), reference.array(weight), atol=1e-5)
        assert found.error < 1e-5


def test_unknown_ways_ranks_and_numbers_are_refused():
    weight = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"row_normalise must be one of none, .* got 'l1'"):
        approximation(weight, 1, row_normalise="l1")  # pyright: ignore
    for rank in (0, 3):
        for moments in (None, torch.eye(2)):
            with pytest.raises(ValueError, match=f"rank.*{rank}"):
                approximation(weight, rank, moments=moments)
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        approximation(weight, 1)
