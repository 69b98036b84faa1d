"""Interference of two deltas: against dense float64, and against what chance really gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.reference import frobenius, lora_delta, principal_cosines
from support.strategies import orthonormal, seeds
from torch import Tensor

from peft_svdinit.factors import (
    ComparableDelta,
    SupportOverlap,
    layer_interference,
    pair_interference,
)
from peft_svdinit.factors.overlap import SpaceOverlap

OUT, IN = 24, 30


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, rank: int = 3, out: int = OUT, inputs: int = IN) -> tuple[Tensor, Tensor]:
    return normal(out, rank, seed=2 * seed), normal(rank, inputs, seed=2 * seed + 1)


def mask(seed: int, density: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), seeds)
def test_norms_inner_product_and_cosine_are_those_of_the_dense_deltas(out, inputs, r, s, seed):
    (B, A), (C, D) = lora(seed % 1000, r, out, inputs), lora(1000 + seed % 997, s, out, inputs)
    first, second = lora_delta(B, A, 0.7), lora_delta(C, D, 2.0)
    found = layer_interference(ComparableDelta.of(B, A, 0.7), ComparableDelta.of(C, D, 2.0))
    assert found.norms == pytest.approx((frobenius(first), frobenius(second)), rel=1e-10)
    assert found.inner == pytest.approx((first * second).sum(), rel=1e-9, abs=1e-10)
    assume(min(found.norms) > 1e-3)
    cosine = (first * second).sum() / frobenius(first) / frobenius(second)
    assert found.cosine == pytest.approx(cosine, abs=1e-10)


def test_angles_are_those_of_the_spaces_of_the_dense_deltas():
    (B, A), (C, D) = lora(1, 3), lora(2, 5)
    B = B.repeat(1, 2)  # the rank stays 3: B is deficient
    A = torch.cat([A, normal(3, IN, seed=9)])
    found = layer_interference(ComparableDelta.of(B, A), ComparableDelta.of(C, D))
    cosines = principal_cosines(torch.linalg.qr(B[:, :3]).Q, torch.linalg.qr(C).Q)
    assert found.outputs is not None and found.inputs is not None
    assert found.outputs.largest == pytest.approx(cosines[0], abs=1e-5)
    assert found.outputs.mean_squared == pytest.approx((cosines**2).mean(), abs=1e-5)
    assert found.outputs.random_mean_squared == 5 / OUT
    rows = principal_cosines(torch.linalg.qr((A[:3] + A[3:]).mT).Q, torch.linalg.qr(D.mT).Q)
    assert found.inputs.largest == pytest.approx(rows[0], abs=1e-5)
    assert found.inputs.random_mean_squared == 5 / IN


def test_a_delta_is_parallel_to_itself_whatever_the_scale():
    B, A = lora(3)
    found = layer_interference(ComparableDelta.of(B, A), ComparableDelta.of(-3 * B, A, 0.1))
    assert found.cosine == pytest.approx(-1.0, abs=1e-12)
    assert found.outputs is not None
    assert found.outputs.mean_squared == pytest.approx(1.0, abs=1e-10)
    assert found.shares_A and found.support is not None and found.support.jaccard == 1.0


def test_disjoint_rows_of_outputs_are_orthogonal():
    (B, A), (C, _) = lora(4), lora(5)
    upper, lower = B.clone(), C.clone()
    upper[OUT // 2 :] = 0
    lower[: OUT // 2] = 0
    found = layer_interference(ComparableDelta.of(upper, A), ComparableDelta.of(lower, A))
    assert found.cosine == pytest.approx(0.0, abs=1e-12)
    assert found.outputs is not None and found.outputs.largest < 1e-6
    assert found.support is not None and found.support.jaccard == 0.0


def test_a_zero_delta_has_no_direction():
    B, A = lora(6)
    found = layer_interference(ComparableDelta.of(B, A), ComparableDelta.of(0 * B, A))
    assert (found.cosine, found.outputs, found.inputs) == (None, None, None)
    whole = pair_interference([found], (found.norms[0], 0.0))
    assert (whole.cosine, whole.outputs, whole.random_cosine) == (None, None, 0.0)


def test_supports_are_compared_where_A_is_shared_alone():
    (B, A), (C, D) = lora(7), lora(8)
    apart = layer_interference(ComparableDelta.of(B, A), ComparableDelta.of(C, D))
    nearly = layer_interference(
        ComparableDelta.of(B, A), ComparableDelta.of(C, torch.nextafter(A, A + 1))
    )
    assert not apart.shares_A and apart.support is None
    assert not nearly.shares_A and nearly.support is None


def test_deltas_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(24, 30\) and \(30, 24\)"):
        layer_interference(ComparableDelta.of(*lora(1)), ComparableDelta.of(*lora(1, 3, IN, OUT)))
    with pytest.raises(ValueError, match=r"masks must have one shape .* \(2,\) and \(3,\)"):
        SupportOverlap.of(torch.ones(2).bool(), torch.ones(3).bool())


# Chance


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("shared", [True, False])
def test_random_B_over_the_given_A_have_the_cosine_stated(shared, density):
    _, A = lora(20, 4)
    # Of uneven rows, so that the rank alone would not tell the cosine.
    A = A * torch.tensor([3.0, 1.0, 1.0, 0.3])[:, None]
    D = A if shared else lora(21, 4)[1]
    cosines, stated = [], 0.0
    for seed in range(400):
        B, C = normal(OUT, 4, seed=3 * seed), normal(OUT, 4, seed=3 * seed + 1)
        B, C = B * mask(seed, density, OUT, 4), C * mask(seed + 10_000, density, OUT, 4)
        found = layer_interference(ComparableDelta.of(B, A), ComparableDelta.of(C, D))
        assert found.cosine is not None
        cosines.append(found.cosine)
        stated = found.random_B_cosine
    measured = math.sqrt(sum(cosine**2 for cosine in cosines) / len(cosines))
    assert measured == pytest.approx(stated, rel=0.15)


def test_random_deltas_have_the_cosine_and_the_angles_stated():
    squares, means = [], []
    for seed in range(300):
        found = layer_interference(
            ComparableDelta.of(*lora(2 * seed)), ComparableDelta.of(*lora(2 * seed + 1))
        )
        assert found.cosine is not None and found.outputs is not None
        squares.append(found.cosine**2)
        means.append(found.outputs.mean_squared)
        assert found.random_cosine == 1 / math.sqrt(OUT * IN)
        assert found.outputs.random_mean_squared == 3 / OUT
    assert math.sqrt(sum(squares) / 300) == pytest.approx(1 / math.sqrt(OUT * IN), rel=0.15)
    assert sum(means) / 300 == pytest.approx(3 / OUT, rel=0.1)


def test_masks_placed_at_random_have_the_overlap_stated():
    overlap = SupportOverlap.of(mask(1, 0.1, 300, 40), mask(2, 0.3, 300, 40))
    assert overlap.jaccard == pytest.approx(overlap.random_jaccard, rel=0.1)
    assert overlap.random_jaccard == pytest.approx(0.03 / 0.37, rel=0.1)


def test_an_overlap_counts_entries_and_adds_up_over_layers():
    left = torch.tensor([True, True, False, False, True])
    right = torch.tensor([True, False, True, False, True])
    one = SupportOverlap.of(left, right)
    assert (one.both, one.either, one.by_chance, one.jaccard) == (2, 4, 9 / 5, 0.5)
    empty = SupportOverlap.of(~left & left, ~left & left)
    assert (empty.jaccard, empty.random_jaccard) == (0.0, 0.0)
    assert SupportOverlap.together([one, empty, one]).as_dict() == {
        "both": 4,
        "either": 8,
        "jaccard": 0.5,
        "random_jaccard": 3.6 / (12 - 3.6),
    }


def test_a_space_within_another_has_cosines_of_one():
    basis = orthonormal(12, 5, torch.Generator().manual_seed(0))
    overlap = SpaceOverlap.of(basis[:, :2], basis)
    assert overlap is not None
    assert overlap.largest == pytest.approx(1.0) and overlap.mean_squared == pytest.approx(1.0)
    assert overlap.random_mean_squared == 5 / 12
    assert SpaceOverlap.of(basis[:, :0], basis) is None


# All layers


def test_two_adapters_are_compared_as_one_vector_each():
    layers = [(lora(30 + i), lora(40 + i)) for i in range(3)]
    found = [layer_interference(*(ComparableDelta.of(*side) for side in pair)) for pair in layers]
    alone = frobenius(lora_delta(*lora(50)))  # a layer that the second adapter lacks
    norms = (
        math.hypot(*(f.norms[0] for f in found), alone),
        math.hypot(*(f.norms[1] for f in found)),
    )
    whole = pair_interference(found, norms)
    dense = [(lora_delta(*a), lora_delta(*b)) for a, b in layers]
    assert whole.inner == pytest.approx(sum((a * b).sum() for a, b in dense), rel=1e-9)
    assert whole.cosine == pytest.approx(whole.inner / norms[0] / norms[1])
    assert (whole.layers, whole.layers_sharing_A, whole.support) == (3, 0, None)
    spread = math.sqrt(sum((f.norms[0] * f.norms[1]) ** 2 for f in found) / (OUT * IN))
    assert whole.random_cosine == pytest.approx(spread / norms[0] / norms[1])
    assert whole.outputs is not None and all(f.outputs is not None for f in found)
    assert whole.outputs.largest == max(f.outputs.largest for f in found if f.outputs)
    mean = sum(f.outputs.mean_squared for f in found if f.outputs) / 3
    assert whole.outputs.mean_squared == pytest.approx(mean)


def test_adapters_without_a_common_layer_are_orthogonal():
    whole = pair_interference([], (1.0, 2.0))
    assert (whole.cosine, whole.layers, whole.outputs, whole.random_cosine) == (0.0, 0, None, 0.0)
