"""A synthesised teacher: what is kept, what is appended, and how much of it is noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.strategies import adapter_factors, layer_names, matrix_of_spectrum, seeds
from torch import Tensor
from torch.testing import assert_close

from peft_svdinit import LowRankFactors
from peft_svdinit.factors import Synthesis
from peft_svdinit.linalg import random_complement
from peft_svdinit.models import layer_seed

syntheses = st.builds(
    Synthesis,
    rank=st.integers(5, 24),
    tail_decay=st.floats(0.01, 2.0),
    noise_share=st.floats(0.0, 0.9),
    seed=seeds,
)


def appended(teacher: LowRankFactors, factors: LowRankFactors) -> Tensor:
    """The dense part of the teacher that the adapter did not have, in float64."""
    kept = slice(factors.rank, None)
    return (teacher.U[:, kept].double() * teacher.S[kept].double()) @ teacher.Vh[kept].double()


def decay_directions(teacher: LowRankFactors, factors: LowRankFactors, synthesis: Synthesis):
    """The random bases in which the appended core is a decaying diagonal plus noise off it.

    They are redrawn as the synthesis draws them, since its result shows the core's SVD only.
    """
    generator = torch.Generator().manual_seed(layer_seed(synthesis.seed, "layer"))
    count = teacher.rank - factors.rank
    left = random_complement(factors.U, count, generator)
    right = random_complement(factors.Vh.mT, count, generator)
    return left.double(), right.double()


@given(factors=adapter_factors(), synthesis=syntheses, name=layer_names)
def test_the_given_triplets_are_kept_and_lead(factors, synthesis, name):
    teacher = synthesis(name, factors)
    assert teacher.rank == min(synthesis.rank, *factors.shape)
    assert teacher.shape == factors.shape
    assert torch.equal(teacher.S[: factors.rank], factors.S)
    assert torch.equal(teacher.U[:, : factors.rank], factors.U)
    assert torch.equal(teacher.Vh[: factors.rank], factors.Vh)
    assert (teacher.S.diff() <= 0).all() and (teacher.S >= 0).all()


@given(factors=adapter_factors(), synthesis=syntheses)
def test_all_vectors_are_orthonormal(factors, synthesis):
    teacher = synthesis("layer", factors)
    identity = torch.eye(teacher.rank)
    assert_close(teacher.U.mT @ teacher.U, identity, rtol=0, atol=1e-5)
    assert_close(teacher.Vh @ teacher.Vh.mT, identity, rtol=0, atol=1e-5)


@given(factors=adapter_factors(), synthesis=syntheses)
def test_the_norm_counts_the_appended_part(factors, synthesis):
    teacher = synthesis("layer", factors)
    assert teacher.norm == pytest.approx(reference.frobenius(teacher.dense()), rel=1e-5)
    assert teacher.energy() == pytest.approx(1.0)
    assert teacher.norm >= factors.norm


@given(factors=adapter_factors(), rank=st.integers(5, 24), decay=st.floats(0.01, 3.0), seed=seeds)
def test_without_noise_the_tail_decays_exponentially_from_the_last(factors, rank, decay, seed):
    teacher = Synthesis(rank, tail_decay=decay, noise_share=0.0, seed=seed)("layer", factors)
    tail = reference.decaying_tail(factors.S[-1].item(), decay, teacher.rank - factors.rank)
    assert_close(
        teacher.S[factors.rank :].double(),
        torch.tensor(tail, dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )


@given(factors=adapter_factors(), synthesis=syntheses)
def test_the_largest_appended_value_is_one_step_of_decay_below_the_last(factors, synthesis):
    teacher = synthesis("layer", factors)
    assume(teacher.rank > factors.rank)
    assert teacher.S[factors.rank].item() == pytest.approx(
        factors.S[-1].item() * math.exp(-synthesis.tail_decay), rel=1e-5
    )


@given(factors=adapter_factors(), synthesis=syntheses)
def test_noise_has_its_share_of_the_appended_energy(factors, synthesis):
    teacher = synthesis("layer", factors)
    assume(teacher.rank - factors.rank > 1)
    left, right = decay_directions(teacher, factors, synthesis)
    core = left.mT @ appended(teacher, factors) @ right
    decay = core.diag()
    noise = core - torch.diag(decay)
    share = noise.square().sum() / core.square().sum()
    assert share.item() == pytest.approx(synthesis.noise_share, abs=1e-4)
    # The rest is the exponential decay, at one scale.
    expected = decay[0] * torch.exp(-synthesis.tail_decay * torch.arange(len(decay)).double())
    assert_close(decay, expected, rtol=0, atol=1e-4 * decay[0].item())


@given(factors=adapter_factors(), synthesis=syntheses)
def test_a_seed_and_a_name_give_equal_bits(factors, synthesis):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (synthesis("layer", factors) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(getattr(first, part), getattr(second, part)) for part in ("U", "S", "Vh")
    )
    assert first.norm == second.norm


def test_other_seeds_and_other_layers_have_other_directions():
    factors = LowRankFactors.from_product(torch.randn(30, 2), torch.randn(2, 40))
    results = [
        Synthesis(8, seed=seed)(name, factors)
        for seed in (0, 1)
        for name in ("layers.0.q_proj", "layers.1.q_proj")
    ]
    for index, first in enumerate(results):
        for second in results[index + 1 :]:
            cosines = reference.principal_cosines(first.U[:, 2:], second.U[:, 2:])
            assert cosines.min() < 0.5


def test_a_layer_is_drawn_the_same_in_whatever_order():
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"layers.{layer}": LowRankFactors.from_product(
            torch.randn(9, 2, generator=generator), torch.randn(2, 7, generator=generator)
        )
        for layer in range(3)
    }
    synthesis = Synthesis(5)
    forwards = {name: synthesis(name, layers[name]) for name in layers}
    backwards = {name: synthesis(name, layers[name]) for name in reversed(layers)}
    for name in layers:
        assert torch.equal(forwards[name].U, backwards[name].U)


def test_a_full_rank_adapter_is_returned_as_it_is():
    factors = LowRankFactors.from_delta(torch.randn(6, 3), 3)
    assert Synthesis(64)("layer", factors) is factors


def test_the_adapters_own_rank_appends_nothing():
    factors = LowRankFactors.from_delta(torch.randn(9, 8), 4)
    assert Synthesis(4)("layer", factors) is factors


def test_a_single_appended_triplet_has_no_noise():
    factors = LowRankFactors.from_product(torch.randn(9, 2), torch.randn(2, 7))
    teacher = Synthesis(3, noise_share=0.5)("layer", factors)
    assert teacher.S[2].item() == pytest.approx(factors.S[1].item() * math.exp(-0.1), rel=1e-5)


def test_a_rank_below_the_adapters_is_refused_by_the_layer():
    factors = LowRankFactors.from_delta(torch.randn(9, 8), 4)
    with pytest.raises(ValueError, match=r"rank must be at least .* 4 in layer layers.3.*got 3"):
        Synthesis(3)("layers.3", factors)


@pytest.mark.parametrize("noise_share", [0.0, 0.3])
def test_an_untrained_adapter_becomes_a_teacher_of_nothing(noise_share):
    factors = LowRankFactors.from_product(torch.zeros(12, 3), torch.randn(3, 10))
    teacher = Synthesis(6, noise_share=noise_share)("layer", factors)
    assert teacher.rank == 6 and teacher.norm == 0
    assert torch.equal(teacher.S, torch.zeros(6))
    assert_close(teacher.U.mT @ teacher.U, torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_tail_of_a_rank_deficient_adapter_starts_at_what_it_learned(rank):
    # Of rank 4 by its shapes; beyond `rank` the singular values are rounding.
    lora_B = matrix_of_spectrum((20, 4), [2.0, 1.0][:rank] + [0.0] * (4 - rank), seed=0)
    factors = LowRankFactors.from_product(lora_B.float(), torch.eye(4, 15))
    teacher = Synthesis(9, noise_share=0.0)("layer", factors)
    last = factors.S[rank - 1].item()
    assert torch.equal(teacher.S[:rank], factors.S[:rank])
    assert teacher.S[rank].item() == pytest.approx(last * math.exp(-0.1), rel=1e-5)
    assert (teacher.S.diff() <= 0).all()
    assert teacher.rank == 9
    # What is rounding sorts behind the five appended triplets, vectors and all.
    assert torch.equal(teacher.U[:, rank + 5 :], factors.U[:, rank:])
    assert torch.equal(teacher.Vh[rank + 5 :], factors.Vh[rank:])
    assert_close(teacher.U.mT @ teacher.U, torch.eye(9), rtol=0, atol=1e-5)
    assert_close(teacher.truncated(rank).dense(), factors.truncated(rank).dense(), rtol=0, atol=0)
    assert teacher.norm == pytest.approx(reference.frobenius(teacher.dense()), rel=1e-5)


def test_a_decay_below_the_smallest_number_appends_zeros():
    factors = LowRankFactors.from_product(torch.randn(9, 2), torch.randn(2, 7))
    teacher = Synthesis(5, tail_decay=2000.0)("layer", factors)
    assert np.isfinite(reference.array(teacher.dense())).all()
    assert torch.equal(teacher.S[2:], torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"tail_decay": 0.0}, "tail_decay must be positive and finite, got 0.0"),
        ({"tail_decay": -1.0}, "tail_decay must be positive and finite"),
        ({"tail_decay": math.nan}, "tail_decay must be positive and finite"),
        ({"tail_decay": math.inf}, "tail_decay must be positive and finite"),
        ({"noise_share": -0.1}, r"noise_share must be in \[0, 1\), got -0.1"),
        ({"noise_share": 1.0}, r"noise_share must be in \[0, 1\)"),
        ({"noise_share": math.nan}, r"noise_share must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Synthesis(**options)
