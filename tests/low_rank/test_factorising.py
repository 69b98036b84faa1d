"""Dense layers of a model become layers of low rank: by entries, by outputs, or not at all."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support import reference
from support.gradient_batches import batches, layer_inputs
from support.low_rank_cases import product_of, switch
from support.peft_fixtures import tiny_base
from support.switching_runs import wide_model
from torch import nn

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    factorize_,
    low_rank_layers,
    make_plan,
)
from peft_svdinit.models import linear_modules

ARCHITECTURES = ("llama", "gpt2")


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """(out, in), float64."""
    found = {}
    for name, linear in linear_modules(model).items():
        weight: Any = model.get_submodule(name).weight
        found[name] = reference.array(weight.mT if linear.transposed else weight)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"train_norms": True}, {"row_normalise": "norms"}])
def test_by_entries_each_layer_gets_the_product_nearest_to_its_weight(architecture, options):
    model: Any = tiny_base(architecture).train()
    model.requires_grad_(False)
    trained = {name for name in linear_modules(model) if ".0." in name}
    for name in trained:
        model.get_submodule(name).weight.requires_grad_(True)
    before = weights(model)
    biases = {n: getattr(model.get_submodule(n), "bias", None) for n in before}
    for each in switch(model, **options):
        layer, weight = each.layer, before[each.name]
        assert model.get_submodule(each.name) is layer and layer.training
        assert layer.bias is biases[each.name]
        factors = [p for name, p in layer.named_parameters() if name != "bias"]
        assert len(factors) == (4 if options.get("train_norms") else 2)
        assert {p.requires_grad for p in factors} == {each.name in trained}
        product = reference.array(product_of(layer))
        lost = reference.frobenius(weight - product)
        size = reference.frobenius(weight)
        assert each.error == pytest.approx(lost / size, rel=1e-4)
        if "row_normalise" not in options:
            best = reference.discarded(torch.from_numpy(weight), layer.rank)
            assert lost == pytest.approx(best, rel=1e-4)
        else:
            norms = np.linalg.norm(weight, axis=1)[:, None]
            best = reference.truncated(torch.from_numpy(weight / norms), layer.rank)
            assert np.allclose(product, norms * best, atol=1e-4 * size)


@pytest.mark.parametrize("train_norms", [False, True])
def test_folded_factors_are_balanced_and_trained_norms_apart(train_norms):
    model = tiny_base()
    for each in switch(model, train_norms=train_norms, row_normalise="norms"):
        layer: Any = each.layer
        identity = np.eye(layer.rank)
        U, Vh = reference.array(layer.U), reference.array(layer.Vh)
        if train_norms:
            assert np.allclose(U.T @ U, identity, atol=1e-5)
            assert np.allclose(Vh @ Vh.T, identity, atol=1e-5)
            continue
        sizes = np.diag(Vh @ Vh.T)
        assert np.allclose(Vh @ Vh.T, np.diag(sizes), atol=1e-5) and (np.diff(sizes) <= 1e-6).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("memory_gb", [4.0, 1e-6])
def test_by_outputs_each_layer_is_nearest_in_what_it_computes(architecture, memory_gb):
    model = tiny_base(architecture)
    given = batches(4, padded=True)
    before, inputs = weights(model), layer_inputs(model, given)
    plain, by_outputs = copy.deepcopy(model), copy.deepcopy(model)
    switch(plain)
    switched = switch(by_outputs, batches=iter(given), memory_gb=memory_gb)
    assert len(switched) > 6
    gains = []
    for each in switched:
        rows = reference.array(inputs[each.name])
        C = rows.T @ rows / len(rows)
        C += 0.01 * np.trace(C) / len(C) * np.eye(len(C))
        root = np.linalg.cholesky(C)
        weight = before[each.name]
        layers = (plain.get_submodule(each.name), each.layer)
        without, error = (
            reference.frobenius((weight - reference.array(product_of(layer))) @ root)  # pyright: ignore
            for layer in layers
        )
        best = reference.discarded(torch.from_numpy(weight @ root), each.layer.rank)
        assert error <= 1.001 * best and error <= 1.001 * without
        lost = reference.frobenius(weight - reference.array(product_of(each.layer)))
        assert each.error == pytest.approx(lost / reference.frobenius(weight), rel=1e-4)
        gains.append(without / error)
    assert max(gains) > 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_have_the_dtype_of_the_weight_and_lose_no_more_than_its_rounding(dtype):
    model: Any = tiny_base().to(dtype)
    before = weights(model)
    for each in switch(model):
        assert {p.dtype for p in each.layer.parameters()} == {dtype}
        weight = torch.from_numpy(before[each.name])
        best = torch.from_numpy(reference.truncated(weight, each.layer.rank))
        lost = reference.frobenius(best.numpy() - reference.array(product_of(each.layer)))
        assert lost <= 2 * torch.finfo(dtype).eps * reference.frobenius(weight)


class Unused(nn.Module):
    """A layer that is never called beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


PLAN = LowRankPlan({"used": PlannedLayer(2, (16, 16)), "unused": PlannedLayer(2, (16, 16))})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": [{"x": torch.ones(2, 16)}]}, RuntimeError, "unused"),
        ({"batches": []}, ValueError, "batch"),
        ({"row_normalise": "l1"}, ValueError, "row_normalise must be one of"),
    ],
)
def test_what_cannot_be_factorised_is_refused_and_nothing_changed(options, error, message):
    model = Unused()
    with pytest.raises(error, match=message):
        factorize_(model, PLAN, **options)
    assert not low_rank_layers(model)


def test_a_weight_that_is_not_finite_is_refused_and_nothing_changed():
    model = Unused()
    with torch.no_grad():
        model.unused.weight[3, 2] = torch.inf
    with pytest.raises(ValueError, match="infinite"):
        factorize_(model, PLAN)
    assert not low_rank_layers(model)


def test_hooks_of_a_layer_go_with_it_and_can_be_removed():
    model = wide_model()
    plan = make_plan(model, LowRankRule(ratio=0.25))
    name = next(iter(plan.layers))
    module = model.get_submodule(name)
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(m), with_kwargs=True),
        module.register_forward_hook(lambda m, args, out: seen.append(m)),
        module.register_full_backward_hook(lambda m, into, out: seen.append(m)),
    ]
    factorize_(model, plan)
    model(input_ids=torch.arange(4)[None]).logits.sum().backward()
    assert seen == [model.get_submodule(name)] * 3 and seen[0] is not module
    for handle in handles:
        handle.remove()
    model(input_ids=torch.arange(4)[None]).logits.sum().backward()
    assert len(seen) == 3


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = wide_model()
    plan = make_plan(model, LowRankRule(ratio=0.25))
    module = model.get_submodule(next(iter(plan.layers)))
    add_hook_to_module(module, ModelHook())
    with pytest.raises(ValueError, match="whose weight or forward is no dense layer's"):
        factorize_(model, plan)
