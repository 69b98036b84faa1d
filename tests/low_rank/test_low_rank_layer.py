"""The layer of low rank computes what the dense layer of its product computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from support.low_rank_cases import product_of, random_layer, random_layers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peft_svdinit.low_rank import LowRankLinear


@given(layer=random_layers(), lead=st.lists(st.integers(1, 3), max_size=3), seed=st.integers(0, 99))
def test_outputs_and_all_gradients_are_those_of_the_dense_layer(layer, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, layer.in_features, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    parts = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    expected = F.linear(theirs, product_of(layer, parts), parts.get("bias"))
    found = layer(ours)
    assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(ours.grad, theirs.grad)
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, parts[name].grad, msg=name)


@given(layer=random_layers())
def test_the_dense_layer_is_of_the_kind_that_was_replaced(layer):
    layer.eval().U.requires_grad_(False)
    if layer.transposed and layer.bias is None:
        return  # There is no Conv1D without a bias.
    dense = layer.dense()
    assert type(dense) is (Conv1D if layer.transposed else nn.Linear)
    assert not dense.training and not dense.weight.requires_grad
    assert dense.weight.is_contiguous() and dense.bias is layer.bias
    weight = dense.weight.mT if layer.transposed else dense.weight
    assert_close(weight, product_of(layer), check_stride=False)
    x = torch.ones(2, layer.in_features, dtype=torch.float64)
    assert_close(layer(x), dense(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_described_as_the_dense_layers(kind, dtype):
    layer = random_layer(6, 4, 2, transposed=kind == "conv1d", dtype=dtype)
    dense: Any = layer.dense().weight
    weight = layer.weight
    assert weight.shape == dense.shape == ((4, 6) if kind == "conv1d" else (6, 4))
    assert (weight.dtype, weight.device) == (dense.dtype, dense.device)
    assert weight.requires_grad and torch.equal(weight, dense)
    assert not random_layer(6, 4, 2).requires_grad_(False).weight.requires_grad
    assert layer.to("meta").weight.is_meta


def test_sizes_are_called_as_both_kinds_call_them():
    layer = random_layer(6, 4, 2, norms=True)
    assert (layer.out_features, layer.nf, layer.in_features, layer.rank) == (6, 6, 4, 2)
    assert "in_features=4, out_features=6, rank=2, bias=True, trained D and S" in repr(layer)


@pytest.mark.parametrize("norms", [False, True])
def test_copies_and_pickles_are_layers_of_their_own(norms):
    layer = random_layer(5, 4, 2, norms=norms).requires_grad_(norms)
    x = torch.randn(3, 4, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.state_dict().keys() == layer.state_dict().keys()
        with torch.no_grad():
            other.U.zero_()
        assert not torch.equal(other(x), layer(x))
        assert all(p.requires_grad == norms for p in other.parameters())


def test_a_state_dict_is_restored_exactly():
    layer, other = (random_layer(5, 4, 2, norms=True, seed=seed) for seed in (0, 1))
    assert set(layer.state_dict()) == {"U", "Vh", "row_norm", "sv_norm", "bias"}
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(other.state_dict()[k], v) for k, v in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        random_layer(5, 4, 3, norms=True).load_state_dict(layer.state_dict())


def test_a_frozen_factor_stays_frozen_and_the_layer_has_memory_of_its_own():
    U, Vh = nn.Parameter(torch.ones(3, 1), requires_grad=False), torch.ones(2, 1).mT
    layer = LowRankLinear(U, Vh)
    assert not layer.U.requires_grad and layer.Vh.requires_grad
    assert layer.Vh.is_contiguous()
    with torch.no_grad():
        layer.U.add_(1)
        layer.Vh.add_(1)
    assert torch.equal(U, torch.ones(3, 1)) and torch.equal(Vh, torch.ones(1, 2))


@pytest.mark.parametrize("norms", [False, True])
def test_under_autocast_it_works_in_half_precision_and_keeps_its_dtype(norms):
    layer = random_layer(16, 12, 4, norms=norms, dtype=torch.float32)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        assert layer.weight.dtype == (layer.weight + 0).dtype == torch.float32
        dense: Any = layer.dense()
        assert torch.equal(layer.weight + 0, dense.weight)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), layer(x), rtol=0.05, atol=0.2)
    found.float().sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert all(each is not None and each.dtype == torch.float32 for each in gradients)


def test_a_layer_cast_to_bfloat16_computes_in_it():
    layer = random_layer(16, 12, 4, norms=True, dtype=torch.float32)
    x = torch.randn(5, 12)
    expected = layer(x)
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} == {layer.weight.dtype}
    assert_close(layer(x.bfloat16()).float(), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"Vh": torch.ones(3, 5)},
        {"bias": nn.Parameter(torch.ones(5))},
        {"row_norm": torch.ones(4)},
        {"sv_norm": torch.ones(2)},
        {"row_norm": torch.ones(2), "sv_norm": torch.ones(2)},
        {"row_norm": torch.ones(4), "sv_norm": torch.ones(4)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(options):
    # Of shapes that contradict each other the suite's type checker says so first.
    with pytest.raises((ValueError, TypeCheckError)):
        LowRankLinear(torch.ones(4, 2), **{"Vh": torch.ones(2, 5), **options})
