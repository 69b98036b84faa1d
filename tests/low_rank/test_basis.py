"""Other factors of a product: balanced, of lower rank, and with a gradient in every direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.low_rank_cases import random_layer, switch
from support.strategies import products
from support.tiny_models import tiny_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_svdinit.low_rank import LowRankPlan, PlannedLayer, factorize_, rebalance_, shrink_
from peft_svdinit.low_rank.basis import rebalanced

wide = st.sampled_from([torch.float32, torch.float64])


def full_rank(product: Any) -> bool:
    """Whether the inner size is one that factors of the product can have."""
    return product.lora_B.shape[1] <= min(len(product.lora_B), product.lora_A.shape[1])


def slack(product: Any) -> float:
    """Of float32 factors, or of the floor under the smallest singular value."""
    left, right = product.lora_B, product.lora_A
    return 1e-5 * float(left.norm().double() * right.norm().double()) + 1e-30


@given(product=products(wide).filter(full_rank))
def test_balanced_factors_have_the_product_and_equal_diagonal_squares(product):
    U, Vh = product.lora_B, product.lora_A
    change = rebalanced(U, Vh)
    assert change.U.shape == U.shape and change.Vh.shape == Vh.shape
    assert {each.dtype for each in change} == {U.dtype}
    near = slack(product)
    old, new = (reference.lora_delta(*pair) for pair in ((U, Vh), (change.U, change.Vh)))
    assert np.abs(old - new).max() <= near
    left, right = (reference.array(each) for each in (change.U, change.Vh))
    of_U, of_Vh = left.T @ left, right @ right.T
    S = reference.singular_values(torch.from_numpy(old))[: len(of_U)]
    alive = 1e-4 * S[0] < S
    for squares in (of_U, of_Vh):
        off_diagonal = np.abs(squares - np.diag(np.diag(squares))).max()
        assert off_diagonal <= near + 1e-6 * np.diag(squares).max()
        assert np.allclose(np.diag(squares)[alive], S[alive], rtol=1e-3, atol=near)


@given(product=products(wide).filter(full_rank), data=st.data())
def test_a_lower_rank_is_the_best_approximation_of_the_product(product, data):
    U, Vh = product.lora_B, product.lora_A
    rank = data.draw(st.integers(1, U.shape[1]))
    change = rebalanced(U, Vh, rank)
    assert change.U.shape == (len(U), rank) and change.Vh.shape == (rank, Vh.shape[1])
    dense = torch.from_numpy(reference.lora_delta(U, Vh))
    lost = reference.frobenius(dense.numpy() - reference.lora_delta(change.U, change.Vh))
    assert lost <= reference.discarded(dense, rank) + slack(product)


@given(product=products(st.just(torch.float64)).filter(full_rank), data=st.data())
def test_the_changes_of_basis_lead_from_the_old_factors_to_the_new(product, data):
    U, Vh = product.lora_B, product.lora_A
    rank = data.draw(st.integers(1, U.shape[1]))
    new_U, new_Vh, H, G = rebalanced(U, Vh, rank)
    S = reference.singular_values(torch.from_numpy(reference.lora_delta(U, Vh)))[:rank]
    alive = torch.from_numpy(1e-3 * S[0] < S)
    near = 1e-6 * float(U.norm() * Vh.norm())
    atol = near / max(float(S[0]) ** 0.5, 1e-30)
    assert_close((U @ H)[:, alive], new_U[:, alive], rtol=1e-6, atol=atol)
    assert_close((G @ Vh)[alive], new_Vh[alive], rtol=1e-6, atol=atol)


def test_a_rank_that_no_product_has_is_refused():
    with pytest.raises(ValueError, match="a product of rank 3 has no factors of rank 4"):
        rebalanced(torch.ones(3, 5), torch.ones(5, 9), 4)
    with pytest.raises(ValueError, match="a product of rank 3 has no factors of rank 5"):
        rebalanced(torch.ones(3, 5), torch.ones(5, 9))


def both_sides(layer: Any) -> Tensor:
    """For each direction, the larger of the gradients of its column of U and row of Vh."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(5)
    outputs = layer(torch.randn(64, layer.in_features, generator=generator).to(layer.U.dtype))
    (outputs * torch.randn(outputs.shape, generator=generator)).sum().backward()
    return torch.maximum(layer.U.grad.norm(dim=0), layer.Vh.grad.norm(dim=1)).float()


WEIGHTS = {
    "zero": torch.zeros(12, 10),
    "of rank one": torch.outer(torch.arange(12.0), torch.ones(10)),
    "with zero rows": torch.cat([torch.eye(10)[:2], torch.zeros(10, 10)]),
    "tiny": 1e-20 * torch.ones(12, 10),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_direction_can_be_trained_after_each_change(weight, norms, dtype):
    model: Any = nn.Sequential(nn.Linear(10, 12, bias=False, dtype=dtype))
    model[0].weight.data.copy_(WEIGHTS[weight])
    plan = LowRankPlan({"0": PlannedLayer(6, (12, 10))})
    (switched,) = factorize_(model, plan, train_norms=norms)
    layer = switched.layer
    before = layer.weight.detach().float()
    assert_close(before, WEIGHTS[weight], rtol=0.02, atol=1e-2 * float(WEIGHTS[weight].max()))
    lowered = LowRankPlan({"0": PlannedLayer(4, (12, 10))})
    for change in (lambda m: None, rebalance_, lambda m: shrink_(m, lowered)):
        change(model)
        reached = both_sides(layer)
        if norms:
            # There S alone has the first gradient.
            reached = torch.maximum(reached, layer.sv_norm.grad.abs().float())  # pyright: ignore
        assert len(reached) == layer.rank and bool((reached > 0).all())
    assert_close(layer.weight.detach().float(), before, rtol=0.05, atol=0.02 * float(before.max()))


@pytest.mark.parametrize("norms", [False, True])
def test_layers_keep_their_products_and_their_parameters_are_the_same_objects(norms):
    model: Any = nn.Sequential(
        random_layer(9, 7, 4, norms=norms), random_layer(5, 9, 3, norms=norms)
    )
    weights = [layer.weight.clone() for layer in model]
    parameters = [id(parameter) for parameter in model.parameters()]
    changed = rebalance_(model)
    assert [each.name for each in changed] == ["0", "1"]
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for layer, weight in zip(model, weights, strict=True):
        assert_close(layer.weight + 0, weight, rtol=1e-6, atol=1e-6)
    if norms:
        layer: Any = model[0]
        identity = torch.eye(4, dtype=torch.float64)
        assert_close(layer.U.mT @ layer.U, identity, rtol=1e-6, atol=1e-6)
        assert_close(layer.Vh @ layer.Vh.mT, identity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norms", [False, True])
def test_a_lower_rank_needs_new_parameters_and_keeps_what_is_frozen_frozen(norms):
    layer = random_layer(9, 7, 4, norms=norms).requires_grad_(norms)
    model = nn.Sequential(layer)
    D = layer.row_norm.detach()[:, None] if layer.row_norm is not None else 1.0
    inner = layer.weight.detach() / D
    old, bias = layer.U, layer.bias
    (changed,) = shrink_(model, LowRankPlan({"0": PlannedLayer(2, (9, 7))}))
    assert layer.rank == 2 and changed.moved.old[0] is old and changed.moved.new[0] is layer.U
    assert layer.bias is bias and all(p.requires_grad == norms for p in layer.parameters())
    # Where D is trained, the rows before it are what is approximated.
    assert np.allclose(
        reference.array(layer.weight.detach() / D), reference.truncated(inner, 2), atol=1e-6
    )


def test_what_cannot_be_shrunk_or_rebalanced_is_refused_and_nothing_changed():
    model = tiny_model()
    with pytest.raises(ValueError, match="has no layer of low rank"):
        rebalance_(model)
    with pytest.raises(ValueError, match="up_proj is dense; factorize_ makes it one"):
        shrink_(model, LowRankPlan({"model.layers.0.mlp.up_proj": PlannedLayer(1, (24, 16))}))
    switch(model)
    ranks = LowRankPlan.of(model)
    names = list(ranks.layers)
    same = ranks.layers[names[1]]
    first = PlannedLayer(1, ranks.layers[names[0]].shape)
    with pytest.raises(ValueError, match=rf"{names[1]} has rank \d; shrink_ lowers ranks, got"):
        shrink_(model, LowRankPlan({names[0]: first, names[1]: same}))
    assert LowRankPlan.of(model) == ranks
