"""An edited base is told from one that was cast, by 64 entries of each weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import seeds, shapes
from torch import Tensor

from peft_svdinit.models import (
    BaseSample,
    entries_at,
    first_difference,
    recognition_sample,
    sampled_positions,
)
from peft_svdinit.models.recognition import MOST_ENTRIES, Differences, differences

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPE = (96, 160)
Chain = tuple[torch.dtype, ...]
# How a weight comes to be recorded or loaded, whatever dtype it was in first.
CHAINS: list[Chain] = [
    (),
    (F16,),
    (BF16,),
    (F16, BF16),
    (BF16, F16),
    (F16, F32),
    (BF16, F32),
    (F16, BF16, F32),
    (BF16, F16, BF16),
]


def outliers(noise: Tensor) -> Tensor:
    return torch.where(noise.abs() > 2.5, 2 * noise, 0.02 * noise)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda noise: 0.02 * noise,
    "large": lambda noise: 30 * noise,
    "with outliers": outliers,
    "sparse": lambda noise: 0.02 * noise * (noise.abs() > 1.6),
    "of three values": lambda noise: 0.0123456 * noise.sign() * (noise.abs() > 0.5),
    "subnormal in float16": lambda noise: 1e-5 * noise,
    "hardly there in float16": lambda noise: 3e-7 * noise,
    "too large for float16": lambda noise: 3e4 * noise,
}


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def cast(weight: Tensor, chain: Chain) -> Tensor:
    for dtype in chain:
        weight = weight.to(dtype)
    return weight


def compared(found: Tensor, recorded: Tensor) -> Differences:
    return differences(recognition_sample(found), recognition_sample(recorded))


@pytest.mark.parametrize("kind", WEIGHTS)
@given(seed=seeds, first=st.sampled_from([F32, F16, BF16]))
@settings(max_examples=10)
def test_casts_in_any_order_leave_a_weight_recognised(kind, seed, first):
    entries = recognition_sample(WEIGHTS[kind](noise(seed)).to(first))
    for recorded, loaded in product(CHAINS, repeat=2):
        assert differences(cast(entries, loaded), cast(entries, recorded)).are_of_rounding


def added(weight: Tensor, share: float, seed: int) -> Tensor:
    return weight + share * weight.square().mean().sqrt() * noise(seed + 1)


@pytest.mark.parametrize("share", [0.003, 0.005, 0.01])
@pytest.mark.parametrize("kind", ["usual", "large", "with outliers", "sparse"])
@given(seed=seeds, dtypes=st.tuples(*[st.sampled_from([F32, F16, BF16])] * 2))
def test_noise_on_a_weight_is_an_edit(kind, share, seed, dtypes):
    weight = WEIGHTS[kind](noise(seed))
    recorded, loaded = dtypes
    found = added(weight, share, seed).to(loaded)
    assert not compared(found, weight.to(recorded)).are_of_rounding


@given(seed=seeds, dtypes=st.tuples(*[st.sampled_from([F32, F16, BF16])] * 2))
def test_a_scaled_weight_is_another(seed, dtypes):
    weight = WEIGHTS["usual"](noise(seed))
    recorded, loaded = dtypes
    assert not compared((1.005 * weight).to(loaded), weight.to(recorded)).are_of_rounding


def test_noise_on_a_part_of_the_rows_is_seen_where_entries_of_it_are_sampled():
    weight = WEIGHTS["usual"](noise(0)).bfloat16()
    edited = weight.clone()
    edited[:24] = added(weight.float(), 0.01, 0)[:24].bfloat16()
    assert not compared(edited, weight).are_of_rounding
    edited = added(weight.float(), 0.01, 0).bfloat16()
    rows = sorted({row for row, _ in sampled_positions(SHAPE)})
    edited[rows] = weight[rows]
    assert compared(edited, weight).are_of_rounding


def test_layers_together_show_what_no_single_one_does():
    """One in eight values moved by a unit, which for a single weight may be chance."""
    layers = []
    for seed in range(20):
        weight = WEIGHTS["large"](noise(seed))
        found, recorded = (1.0008 * weight).bfloat16(), weight.bfloat16()
        assert compared(found, recorded).are_of_rounding
        layers.append(
            (str(seed), recognition_sample(found), BaseSample(recognition_sample(recorded)))
        )
    assert first_difference(layers) == "all layers together"
    unedited = [(name, sample.entries, sample) for name, _, sample in layers]
    assert first_difference(unedited) is None


@pytest.mark.parametrize("chains", [((F16,), (BF16,)), ((BF16,), (F16, BF16))])
def test_values_are_rounded_twice_as_often_as_expected(chains):
    """From where float16 has two bits to where it has its full precision."""
    generator = torch.Generator().manual_seed(0)
    loaded, recorded = chains
    for exponent in range(-23, -10):
        total = Differences()
        for _ in range(100):
            entries = (1 + torch.rand(MOST_ENTRIES, generator=generator)) * 2.0**exponent
            total += differences(cast(entries, loaded), cast(entries, recorded))
        assert total.are_of_rounding, (exponent, total)
        assert total.twice_rounded > 0.8 * total.expected - 8, (exponent, total)


@given(shape=shapes(200))
def test_positions_are_distinct_within_the_weight_and_spread(shape):
    positions = sampled_positions(shape)
    assert len(set(positions)) == len(positions) <= MOST_ENTRIES
    assert all(0 <= row < shape[0] and 0 <= col < shape[1] for row, col in positions)
    if math.prod(shape) <= MOST_ENTRIES:
        assert len(positions) == math.prod(shape)
    if min(shape) >= MOST_ENTRIES:
        assert [len(set(indices)) for indices in zip(*positions, strict=True)] == [64, 64]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0123])
def test_one_entry_that_is_another_is_an_edit(value):
    weight = WEIGHTS["usual"](noise(0)).half()
    row, col = sampled_positions(SHAPE)[5]
    weight[row, col] = 0.0123
    edited = weight.clone()
    edited[row, col] = value
    assert not compared(edited, weight).are_of_rounding
    assert (
        torch.equal(entries_at(edited, [(row, col)]), edited[row, col : col + 1]) or value != value
    )
