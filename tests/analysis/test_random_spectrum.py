"""Spectra of random deltas against sampled Gaussian matrices and their law in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import shapes

from peft_svdinit.analysis.deltas.random_spectrum import (
    RandomAdapter,
    RandomDelta,
    random_reference,
)
from peft_svdinit.factors import Spectrum

SHAPES = [(120, 120), (60, 200), (300, 40), (5, 150)]


def sampled(shape: tuple[int, int], draws: int, *, inner: int | None = None) -> np.ndarray:
    """Singular values (draws, held) of Gaussian matrices, or of products of inner rank `inner`."""
    source = np.random.default_rng(0)
    if inner is None:
        matrices = source.standard_normal((draws, *shape))
    else:
        left = source.standard_normal((draws, shape[0], inner))
        matrices = left @ source.standard_normal((draws, inner, shape[1]))
    return np.linalg.svd(matrices, compute_uv=False)[:, :inner]


def energies(values: np.ndarray) -> np.ndarray:
    """Mean share of the energy in the first r triplets, for r = 1, 2, …"""
    squares = values**2
    return (np.cumsum(squares, axis=1) / squares.sum(axis=1, keepdims=True)).mean(axis=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_expected_spectrum_is_that_of_sampled_matrices(shape):
    values = sampled(shape, 40)
    norm = math.sqrt(shape[0] * shape[1])
    expected = RandomDelta(shape).singular_values(norm, min(shape))
    scale = values.mean(axis=0)[0]
    assert np.abs(expected - values.mean(axis=0)).max() < 0.03 * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_of_the_first_triplets_is_that_of_sampled_matrices(shape):
    expected = [RandomDelta(shape).energy(rank) for rank in range(1, min(shape) + 1)]
    assert expected == pytest.approx(energies(sampled(shape, 40)), rel=0.04)
    assert expected[-1] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(400, 400), (300, 120), (50, 400)])
def test_the_law_is_marchenko_pasturs_density_integrated(shape):
    c = min(shape) / max(shape)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    # Midpoints in the angle, where the density has no pole and no infinite slope.
    edges = np.linspace(0, math.pi, 200_001)
    angles = (edges[1:] + edges[:-1]) / 2
    squares = (low + high) / 2 + (high - low) / 2 * np.cos(angles)
    density = np.sqrt((high - squares) * (squares - low)) / (2 * math.pi * c * squares)
    mass = density * (high - low) / 2 * np.sin(angles) * np.diff(edges)
    assert mass.sum() == pytest.approx(1, abs=1e-6)
    for rank in (1, min(shape) // 7, min(shape) // 2):
        above = np.cumsum(mass) <= rank / min(shape)
        assert RandomDelta(shape).energy(rank) == pytest.approx(
            (squares * mass)[above].sum(), rel=2e-3
        )


@given(shape=shapes(40))
def test_singular_values_lie_between_the_edges_and_hold_the_norm(shape):
    values = RandomDelta(shape).singular_values(2.0, 100)
    rows, cols = map(math.sqrt, shape)
    low, high = (2.0 * side / (rows * cols) for side in (abs(rows - cols), rows + cols))
    assert len(values) == min(shape)
    assert all(low - 1e-6 <= value <= high + 1e-6 for value in values)
    assert values == sorted(values, reverse=True)
    assert math.hypot(*values) == pytest.approx(2.0)


@given(shape=shapes(40), rank=st.integers(1, 50))
def test_the_energy_of_a_random_delta_grows_with_the_rank_and_not_with_its_orientation(shape, rank):
    here, turned = RandomDelta(shape), RandomDelta(shape[::-1])
    assert here.energy(rank) == turned.energy(rank)
    assert 0 < here.energy(rank) <= here.energy(rank + 1) + 1e-12 <= 1 + 2e-12
    # The first triplets hold at least their even share.
    assert here.energy(rank) >= min(1.0, rank / min(shape)) - 1e-9


@pytest.mark.parametrize("shape", [(30, 30), (12, 80)])
def test_the_threshold_is_passed_about_once_in_a_thousand(shape):
    largest = sampled(shape, 6000)[:, 0]
    share = (largest > RandomDelta(shape).largest(1.0)).mean()
    assert 0.0001 < share < 0.004
    # Well inside the tail: of ten random deltas nine stay a clear margin below.
    assert np.quantile(largest, 0.9) < RandomDelta(shape).largest(1.0)


@pytest.mark.parametrize("shape", [(50, 40), (24, 90)])
def test_a_random_adapter_has_the_spectrum_of_sampled_products(shape):
    reference = RandomAdapter(shape, 6)
    values = sampled(shape, 400, inner=6)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    assert reference.singular_values(3.0, 6) == pytest.approx(3 * values.mean(axis=0), rel=0.03)
    assert [reference.energy(rank) for rank in range(1, 7)] == pytest.approx(
        energies(values), rel=0.03
    )
    share = (values[:, 0] > reference.largest(1 / 6)).mean()
    assert share < 0.02


def test_a_random_adapter_is_the_same_each_time_and_leaves_the_global_seed_alone():
    state = torch.get_rng_state()
    one = RandomAdapter((31, 17), 5).singular_values(1.0, 5)
    assert one == RandomAdapter((31, 17), 5).singular_values(1.0, 5)
    assert torch.equal(state, torch.get_rng_state())


def spectrum(values: list[float], shape: tuple[int, int], norm: float | None = None) -> Spectrum:
    return Spectrum(torch.tensor(values), math.hypot(*values) if norm is None else norm, shape)


def test_a_whole_delta_of_low_rank_is_compared_with_adapters_and_any_other_with_matrices():
    assert random_reference("a", spectrum([2.0, 1.0, 0.0], (9, 7))) == RandomAdapter((9, 7), 2)
    assert random_reference("a", spectrum([2.0, 1.0], (9, 7), norm=4.0)) == RandomDelta((9, 7))
    assert random_reference("a", spectrum([2.0, 1.0], (9, 2))) == RandomDelta((9, 2))
    assert random_reference("a", spectrum([0.0, 0.0], (9, 7))) == RandomDelta((9, 7))


def test_layers_of_one_shape_share_the_search_for_its_law(monkeypatch):
    searched, stock = [], RandomDelta.energy_above

    def counted(delta, shares):
        searched.append(delta.shape)
        return stock(delta, shares)

    monkeypatch.setattr(RandomDelta, "energy_above", counted)
    deltas = [RandomDelta((37, 191)) for _ in range(4)]
    found = {(delta.energy(3), *delta.singular_values(2.0, 5)) for delta in deltas}
    assert len(found) == 1 and len(searched) <= 2
