"""Moments carried to factors are those of the gradients that the factors would have had.

The first moment is linear in the gradients, so that it is compared exactly; the second one with the
variances of independent entries, from the Jacobian of one gradient by the other, entry by entry.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank_cases import product_of, random_layer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peft_svdinit.low_rank import (
    LowRankLinear,
    LowRankPlan,
    PlannedLayer,
    factorize_,
    rebalance_,
    shrink_,
)
from peft_svdinit.optim import Moved

OUT, INNER, RANK = 5, 4, 3
BETAS = (0.9, 0.99)
kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])
norms = pytest.mark.parametrize("norms", [False, True])


def gradients(layer: LowRankLinear, gradient: Tensor) -> list[Tensor]:
    """Of <gradient, W> by the factors, by autograd; `gradient` is (out, in)."""
    parameters = [p for name, p in layer.named_parameters() if name != "bias"]
    return list(torch.autograd.grad((gradient * product_of(layer)).sum(), parameters))


def accumulated(steps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Adam's moments after these gradients, by its definition."""
    first, second = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    for gradient in steps:
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    return first, second


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def factorised(kind: str, train_norms: bool) -> tuple[LowRankLinear, Moved]:
    made: Any = nn.Linear(INNER, OUT) if kind == "linear" else Conv1D(OUT, INNER)
    model = nn.Sequential(made).double()
    made.weight.data = drawn(*made.weight.shape)
    plan = LowRankPlan({"0": PlannedLayer(RANK, (OUT, INNER))})
    options: dict[str, Any] = {"train_norms": train_norms, "row_normalise": "norms"}
    (switched,) = factorize_(model, plan, **options)
    return switched.layer, switched.moved


def stored(layer: LowRankLinear, moment: Tensor) -> Tensor:
    """As the dense weight's moment lies in the optimizer."""
    return moment.mT.contiguous() if layer.transposed else moment


@kinds
@norms
def test_the_first_moment_of_factors_is_what_adam_would_have_accumulated(kind, norms):
    layer, moved = factorised(kind, norms)
    steps = [drawn(OUT, INNER, seed=seed) for seed in range(6)]
    first, _ = accumulated(steps)
    carried = moved.carry([stored(layer, first)], False)
    per_step = [gradients(layer, step) for step in steps]
    assert len(carried) == len(moved.new) == (4 if norms else 2)
    named = {
        id(p): index
        for index, p in enumerate(p for n, p in layer.named_parameters() if n != "bias")
    }
    for parameter, moment in zip(moved.new, carried, strict=True):
        index = named[id(parameter)]
        expected, _ = accumulated([each[index] for each in per_step])
        assert_close(moment.double(), expected, rtol=1e-4, atol=1e-5)


def variances(layer: LowRankLinear, entries: Tensor) -> list[Tensor]:
    """Of the factors' gradients where the entries of ∇W are independent with these variances."""
    total = [torch.zeros_like(each) for each in gradients(layer, torch.zeros_like(entries))]
    for row in range(OUT):
        for col in range(INNER):
            unit = torch.zeros_like(entries)
            unit[row, col] = 1
            for sum_, each in zip(total, gradients(layer, unit), strict=True):
                sum_ += each**2 * entries[row, col]
    return total


@kinds
@norms
def test_the_second_moment_of_factors_is_the_variance_of_independent_entries(kind, norms):
    layer, moved = factorised(kind, norms)
    second = drawn(OUT, INNER, seed=9).square()
    carried = moved.carry([stored(layer, second)], True)
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    expected = dict(zip(names, variances(layer, second), strict=True))
    by_identity = {id(p): name for name, p in layer.named_parameters()}
    for parameter, moment in zip(moved.new, carried, strict=True):
        assert moment.shape == parameter.shape and bool((moment >= 0).all())
        assert_close(moment.double(), expected[by_identity[id(parameter)]], rtol=1e-4, atol=1e-6)


def changed(layer: LowRankLinear, rank: int) -> Moved:
    model = nn.Sequential(layer)
    if rank == layer.rank:
        (found,) = rebalance_(model)
    else:
        (found,) = shrink_(model, LowRankPlan({"0": PlannedLayer(rank, (OUT, INNER))}))
    return found.moved


@given(rank=st.integers(1, RANK), seed=st.integers(0, 999))
def test_first_moments_carried_to_other_factors_are_the_gradients_of_those(rank, seed):
    layer = random_layer(OUT, INNER, RANK, seed=seed)
    steps = [drawn(OUT, INNER, seed=seed + number) for number in range(4)]
    before = [gradients(layer, step) for step in steps]
    moments = [accumulated([each[part] for each in before])[0] for part in (0, 1)]
    moved = changed(layer, rank)
    after = [gradients(layer, step) for step in steps]
    for part, carried in enumerate(moved.carry(moments, False)):
        expected = accumulated([each[part] for each in after])[0]
        assert_close(carried.double(), expected, rtol=1e-3, atol=1e-3)


@given(rank=st.integers(1, RANK), seed=st.integers(0, 999))
def test_second_moments_carried_to_other_factors_are_variances(rank, seed):
    layer = random_layer(OUT, INNER, RANK, seed=seed)
    old_U, old_Vh = layer.U.detach().clone(), layer.Vh.detach().clone()
    moments = [drawn(OUT, RANK, seed=seed).square(), drawn(RANK, INNER, seed=seed + 1).square()]
    moved = changed(layer, rank)
    # U' = U H and Vh' = G Vh, solved for anew.
    H, G = torch.linalg.pinv(old_U) @ layer.U, layer.Vh @ torch.linalg.pinv(old_Vh)
    of_U, of_Vh = torch.zeros(OUT, rank).double(), torch.zeros(rank, INNER).double()
    for new in range(rank):
        for old in range(RANK):
            of_U[:, new] += G[new, old] ** 2 * moments[0][:, old]
            of_Vh[new] += H[old, new] ** 2 * moments[1][old]
    found = [each.double() for each in moved.carry(moments, True)]
    assert_close(found, [of_U, of_Vh], rtol=1e-3, atol=1e-4)


def test_a_direction_that_is_zero_takes_nothing_over():
    layer = random_layer(OUT, INNER, RANK)
    with torch.no_grad():
        layer.U[:, 2] = layer.U[:, 1]
        layer.Vh[2] = layer.Vh[1]
    moved = changed(layer, RANK)
    for squared in (False, True):
        of_U, of_Vh = moved.carry([drawn(OUT, RANK), drawn(RANK, INNER)], squared)
        assert torch.count_nonzero(of_U[:, 2]) == 0 and bool(torch.isfinite(of_Vh).all())


@pytest.mark.parametrize("rank", [2, RANK])
def test_moments_beside_trained_norms_are_not_carried_to_other_factors(rank):
    layer = random_layer(OUT, INNER, RANK, norms=True)
    moved = changed(layer, rank)
    assert moved.new == (layer.U, layer.Vh, layer.row_norm, layer.sv_norm)
    with pytest.raises(TypeError, match=r"layer 0: .* trained norms cannot be carried over; use"):
        moved.carry([drawn(OUT, RANK)], False)
