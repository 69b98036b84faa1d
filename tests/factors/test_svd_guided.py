"""LoRA weights from factors: what each start and split promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import layer_factors, matrix_of_spectrum
from torch.testing import assert_close

from peft_svdinit import LowRankFactors, SvdGuided
from peft_svdinit.factors.svd_guided import SPLITS, STARTS

scalings = st.sampled_from([0.25, 1.0, 2.0, 16.0, math.sqrt(8)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[LowRankFactors, int, float]:
    factors = draw(layer_factors())
    return factors, draw(st.integers(1, factors.rank)), draw(scalings)


@pytest.mark.parametrize("start", ["delta", "reference"])
@pytest.mark.parametrize("split", SPLITS)
@given(case=cases())
def test_the_scaled_product_is_the_truncated_delta(start, split, case):
    factors, rank, scaling = case
    init = SvdGuided(start, split)(factors, rank=rank, scaling=scaling)
    scale = factors.S[0].item()
    assert_close(
        scaling * init.lora_B @ init.lora_A,
        factors.truncated(rank).dense(),
        rtol=0,
        atol=1e-6 * scale,
    )
    assert init.subtract_initial is (start == "reference")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("split", SPLITS)
@given(case=cases())
def test_shapes_are_those_of_lora_and_the_dtype_is_float32(start, split, case):
    factors, rank, scaling = case
    init = SvdGuided(start, split)(factors, rank=rank, scaling=scaling)
    rows, cols = factors.shape
    assert init.lora_A.shape == (rank, cols) and init.lora_B.shape == (rows, rank)
    assert init.lora_A.dtype == init.lora_B.dtype == torch.float32
    assert torch.isfinite(init.lora_A).all() and torch.isfinite(init.lora_B).all()


@pytest.mark.parametrize("split", SPLITS)
@given(case=cases())
def test_subspace_inherits_the_right_vectors_and_no_progress(split, case):
    factors, rank, scaling = case
    init = SvdGuided("subspace", split)(factors, rank=rank, scaling=scaling)
    assert torch.equal(init.lora_A, factors.Vh[:rank])
    assert torch.equal(init.lora_B, torch.zeros_like(init.lora_B))
    assert init.subtract_initial is False


@given(case=cases())
def test_output_puts_the_singular_values_into_b(case):
    factors, rank, scaling = case
    init = SvdGuided("delta", "output")(factors, rank=rank, scaling=scaling)
    assert torch.equal(init.lora_A, factors.Vh[:rank])
    assert_close(init.lora_B.norm(dim=0), factors.S[:rank] / scaling, rtol=1e-5, atol=0)


@given(case=cases())
def test_balanced_gives_both_factors_of_a_live_direction_the_same_size(case):
    factors, rank, scaling = case
    init = SvdGuided("delta", "balanced")(factors, rank=rank, scaling=scaling)
    S = factors.S[:rank]
    alive = S > 1e-3 * S[0]
    rows, columns = init.lora_A.norm(dim=1)[alive], init.lora_B.norm(dim=0)[alive]
    assert_close(rows, columns, rtol=1e-4, atol=0)
    assert_close(rows.square(), S[alive] / scaling, rtol=1e-4, atol=0)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("split", SPLITS)
@given(case=cases())
def test_every_direction_can_train(start, split, case):
    # The gradient of B is that of the product times A, the gradient of A that times B: a direction
    # trains unless its row of A and its column of B are both zero.
    factors, rank, scaling = case
    init = SvdGuided(start, split)(factors, rank=rank, scaling=scaling)
    assert ((init.lora_A.norm(dim=1) > 0) | (init.lora_B.norm(dim=0) > 0)).all()


@pytest.mark.parametrize("spectrum", [[1.0, 0.5, 0.0, 0.0], [0.0] * 4, [1.0, 1e-9, 0.0, 0.0]])
def test_dead_directions_of_balanced_keep_their_right_vector(spectrum):
    delta = matrix_of_spectrum((6, 5), spectrum, seed=0).float()
    factors = LowRankFactors.from_delta(delta, 4)
    init = SvdGuided("delta", "balanced")(factors, rank=4, scaling=2.0)
    live = sum(value > 1e-6 for value in spectrum)
    assert torch.equal(init.lora_A[live:], factors.Vh[live:])
    assert torch.equal(init.lora_B[:, live:], torch.zeros(6, 4 - live))


@pytest.mark.parametrize("start", STARTS)
def test_the_factors_are_not_changed_by_training_the_adapter(start):
    factors = LowRankFactors.from_delta(torch.randn(6, 5), 4)
    before = factors.Vh.clone(), factors.U.clone()
    init = SvdGuided(start)(factors, rank=4, scaling=1.0)
    init.lora_A.fill_(7.0)
    init.lora_B.fill_(7.0)
    assert torch.equal(factors.Vh, before[0]) and torch.equal(factors.U, before[1])


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_above_what_is_held_is_refused(rank):
    factors = LowRankFactors.from_delta(torch.randn(6, 5), 3)
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 3\].*got {rank}"):
        SvdGuided()(factors, rank=rank, scaling=1.0)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
def test_a_scaling_that_is_not_positive_is_refused(scaling):
    factors = LowRankFactors.from_delta(torch.randn(6, 5), 3)
    with pytest.raises(ValueError, match=f"scaling must be positive and finite, got {scaling}"):
        SvdGuided()(factors, rank=2, scaling=scaling)


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="svd_start must be one of delta, subspace, reference"):
        SvdGuided(start="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="svd_split must be one of output, balanced, got 'input'"):
        SvdGuided(split="input")  # pyright: ignore[reportArgumentType]
