"""Planted directions are found, random deltas have none; intruders against dense cosines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.strategies import layer_factors, matrix_of_spectrum, orthonormal, seeds

from peft_svdinit import LowRankFactors
from peft_svdinit.analysis import find_intruders
from peft_svdinit.analysis.deltas.spikes import find_spikes
from peft_svdinit.factors import Spectrum

SHAPE = (90, 60)


def noise(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(strengths: list[float], seed: int, level: float = 1.0) -> torch.Tensor:
    """Orthogonal directions of these strengths in Gaussian noise of this standard deviation."""
    return matrix_of_spectrum(SHAPE, strengths, seed) + level * noise(SHAPE, seed)


def spectrum_of(matrix: torch.Tensor, held: int) -> Spectrum:
    values = torch.linalg.svdvals(matrix)
    return Spectrum(values[:held], float(values.norm()), (matrix.shape[0], matrix.shape[1]))


# Strengths are visible above (90 * 60)^¼ = 8.6 and far outside above twice that.
@given(
    strengths=st.lists(st.floats(20, 200), max_size=8), held=st.sampled_from([12, 60]), seed=seeds
)
def test_planted_directions_are_counted_at_any_level_of_noise(strengths, held, seed):
    strengths = sorted(strengths, reverse=True)
    for level in (1e-3, 1.0):
        matrix = planted([level * strength for strength in strengths], seed, level)
        found = find_spikes("layer", spectrum_of(matrix, held))
        assert found.count == len(strengths)
        assert found.complete and found.reference == "delta"
        assert found.noise == pytest.approx(level, rel=0.05)
        assert found.signals == pytest.approx(
            [level * strength for strength in strengths], rel=0.12, abs=4 * level
        )


def test_random_deltas_have_no_spikes():
    found = [find_spikes("layer", spectrum_of(noise(SHAPE, seed), 20)).count for seed in range(300)]
    assert sum(count > 0 for count in found) <= 2


def test_random_adapters_have_no_spikes_and_one_with_a_strong_direction_has_one():
    counts = []
    for seed in range(200):
        product = noise((40, 6), seed) @ noise((6, 30), seed + 1000)
        counts.append(find_spikes("layer", spectrum_of(product, 6)).count)
    assert sum(count > 0 for count in counts) <= 3

    factors = LowRankFactors.from_product(
        noise((40, 6), 1) * torch.tensor([30.0, 1, 1, 1, 1, 1]), noise((6, 30), 2)
    )
    found = find_spikes("layer", factors)
    assert (found.count, found.reference) == (1, "adapter")
    assert found.energy == pytest.approx(factors.energy(1), abs=1e-6)


def test_one_direction_of_equal_singular_values_does_not_stand_out():
    for values in ([3.0], [2.0, 2.0, 2.0]):
        S = torch.tensor(values)
        assert find_spikes("layer", Spectrum(S, math.hypot(*values), (9, 7))).count == 0


def test_where_every_held_triplet_stands_out_the_count_is_called_a_lower_bound():
    matrix = planted([90.0, 80.0, 70.0, 60.0], seed=3)
    found = find_spikes("layer", spectrum_of(matrix, 2))
    assert found.count == 2 and not found.complete
    assert find_spikes("layer", spectrum_of(matrix, 5)).complete


def test_a_signal_is_the_value_without_its_share_of_the_noise():
    # Section 3.1 of arXiv:1103.2221, for entries of variance 1/m: value² = (1+θ²)(c+θ²)/θ².
    rows, cols, theta = SHAPE[0], SHAPE[1], 2.5
    value = math.sqrt((1 + theta**2) * (cols / rows + theta**2)) / theta
    others = torch.tensor([0.1], dtype=torch.float64)
    # The rest is spread over the dimensions that the spike leaves.
    rest = (rows - 1) * (cols - 1) / rows
    S = torch.cat([torch.tensor([value], dtype=torch.float64), others])
    found = find_spikes("layer", Spectrum(S, math.sqrt(value**2 + rest), SHAPE))
    assert found.count == 1
    assert found.noise == pytest.approx(1 / math.sqrt(rows))
    assert found.signals == pytest.approx([theta])


@given(factors=layer_factors())
def test_spikes_are_the_first_singular_values_and_their_energy(factors):
    found = find_spikes("layer", factors)
    values = factors.S.double().tolist()
    assert list(found.values) == values[: found.count]
    assert all(value > found.edge for value in found.values)
    assert 0 <= found.energy <= 1
    assert all(0 <= s <= v for s, v in zip(found.signals, found.values, strict=True))
    if found.count:
        assert found.energy == pytest.approx(factors.energy(found.count), abs=1e-6)


def test_a_zero_delta_has_no_spikes():
    found = find_spikes("layer", LowRankFactors.from_delta(torch.zeros(6, 4), 3))
    assert (found.count, found.energy, found.noise, found.edge) == (0, 0.0, 0.0, 0.0)


def test_a_value_that_is_not_finite_is_refused_with_the_layer():
    with pytest.raises(ValueError, match=r"h\.0\.q.*finite"):
        find_spikes("h.0.q", Spectrum(torch.tensor([math.nan]), 1.0, (2, 2)))


def dense_cosines(base: torch.Tensor, tuned: torch.Tensor, top_k: int) -> np.ndarray:
    """Largest |cosine| of each leading tuned vector with any of the base's, from full SVDs."""
    known = np.linalg.svd(reference.array(base), full_matrices=False)[0]
    leading = np.linalg.svd(reference.array(tuned), full_matrices=False)[0][:, :top_k]
    return np.abs(leading.T @ known).max(axis=1)


@pytest.mark.parametrize("shape", [(120, 90), (80, 130)])
@pytest.mark.parametrize("size", [0.05, 0.5, 3.0])
def test_intruders_are_those_of_the_full_decompositions(shape, size):
    smaller = min(shape)
    base = matrix_of_spectrum(shape, [2.0 ** -(j / 12) for j in range(smaller)], 0).float()
    change = matrix_of_spectrum(shape, [size, 0.7 * size, 0.4 * size], 1).float()
    found = find_intruders("layer", base, base + change, top_k=6)
    expected = dense_cosines(base, base + change, 6)
    assert found.indices == [i for i, cosine in enumerate(expected, 1) if cosine < 0.5]
    for cosine, exact in zip(found.cosines, expected, strict=True):
        assert cosine == pytest.approx(exact, abs=1e-3)
    values = reference.singular_values(base + change)[:6]
    assert found.values == pytest.approx(values, rel=1e-4)
    if size > 1:
        assert found.indices


def test_a_tuned_vector_that_is_a_weak_one_of_the_base_is_no_intruder():
    generator = torch.Generator().manual_seed(4)
    left, right = orthonormal(100, 100, generator), orthonormal(100, 100, generator)
    S = torch.linspace(2, 1, 100, dtype=torch.float64)
    stronger = S.clone()
    stronger[95] = 9.0
    base, tuned = (left * S) @ right.mT, (left * stronger) @ right.mT
    found = find_intruders("layer", base.float(), tuned.float(), top_k=1)
    assert not found.indices
    assert found.cosines == pytest.approx([1.0], abs=1e-3)


def test_a_spectrum_of_close_values_makes_no_intruders_of_the_approximation():
    # As in trained weights: the vectors of an approximate SVD would be mixtures of neighbours.
    weight = matrix_of_spectrum((150, 120), torch.linspace(2, 1, 120).tolist(), 6)
    tuned = weight + 1e-4 * noise((150, 120), 7)
    found = find_intruders("layer", weight.float(), tuned.float())
    assert not found.indices
    assert found.cosines == pytest.approx(dense_cosines(weight, tuned, 10), abs=1e-2)


def test_a_base_of_low_rank_lends_no_directions_that_it_does_not_have():
    base = matrix_of_spectrum((30, 24), [2.0, 1.0], 8).float()
    change = matrix_of_spectrum((30, 24), [9.0], 9).float()
    found = find_intruders("layer", base, base + change, top_k=1)
    known = np.linalg.svd(reference.array(base))[0][:, :2]
    leading = np.linalg.svd(reference.array(base + change))[0][:, :1]
    assert found.cosines == pytest.approx(np.abs(leading.T @ known).max(axis=1), abs=1e-3)


def test_an_unchanged_weight_has_no_intruders_and_a_zero_one_no_directions():
    weight = matrix_of_spectrum((20, 30), [1 / (1 + j) for j in range(20)], 5).float()
    assert not find_intruders("layer", weight, weight).indices
    zero = torch.zeros_like(weight)
    assert find_intruders("layer", zero, weight, top_k=3).indices == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k must be at least 1"), ({"threshold": 1.5}, "threshold must be in")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_intruders("layer", torch.eye(3), torch.eye(3), **options)


def test_weights_of_two_shapes_are_refused_with_the_layer():
    with pytest.raises(ValueError, match=r"h\.0\.q: base has shape \(3, 3\) and tuned \(4, 3\)"):
        find_intruders("h.0.q", torch.eye(3), torch.zeros(4, 3))
