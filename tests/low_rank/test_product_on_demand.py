"""The weight of a low-rank layer: formed when it is used, described without, never changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.low_rank_cases import product_of, random_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from peft_svdinit.low_rank import LowRankLinear


@pytest.fixture
def formed(monkeypatch) -> list[None]:
    """Grows by one entry for each product that a layer forms."""
    counted: list[None] = []
    product = LowRankLinear._product

    def counting(layer: LowRankLinear) -> Tensor:
        counted.append(None)
        return product(layer)

    monkeypatch.setattr(LowRankLinear, "_product", counting)
    return counted


def test_a_description_forms_nothing(formed):
    weight: Any = random_layer(6, 4, 2).weight
    for each in (weight, weight.data, weight.detach()):
        assert each.shape == each.size() == (6, 4) and each.size(0) == 6
        assert each.dtype == torch.float64 and each.is_floating_point()
        assert each.device.type == "cpu" and not each.is_meta and each.layout == torch.strided
        assert each.dim() == each.ndim == 2 and each.numel() == 24
        assert isinstance(each, Tensor)
    assert weight.requires_grad and not weight.data.requires_grad
    assert not formed


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(),
    "sum of the copy": lambda w: w.clone().sum(),
    "operator": lambda w: (2 * w - 1).square().sum(),
    "item": lambda w: w[1, 2],
    "transposed": lambda w: w.T[0].sum(),
    "linear": lambda w: F.linear(torch.ones(3, 4, dtype=w.dtype), w).square().sum(),
    "matmul": lambda w: (torch.ones(3, 6, dtype=w.dtype) @ w).square().sum(),
    "in a list": lambda w: torch.cat([w, w]).square().sum(),
    "norm": lambda w: torch.linalg.matrix_norm(w),
    "cast": lambda w: w.to(torch.float32).sum().double(),
    "keyword": lambda w: torch.sum(input=w),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("norms", [False, True])
def test_any_use_is_one_of_the_product_and_its_gradients_reach_the_factors(formed, use, norms):
    layer = random_layer(6, 4, 2, bias=False, norms=norms)
    parts = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    expected, found = USES[use](product_of(layer, parts)), USES[use](layer.weight)
    assert formed
    assert_close(found, expected)
    expected.backward()
    found.backward()
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, parts[name].grad, msg=name)


def test_what_is_detached_gives_no_gradients():
    layer = random_layer(6, 4, 2)
    for detached in (layer.weight.detach(), layer.weight.data):
        assert torch.equal(detached, layer.weight) and not (detached + 0).requires_grad


def set_item(weight: Any) -> None:
    weight[0] = 0


def add_to(weight: Any) -> None:
    weight += 1


def set_data(weight: Any) -> None:
    weight.data = torch.zeros(6, 4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(6, 4)),
    "of the data": lambda w: w.data.normal_(),
    "of what is detached": lambda w: w.detach().mul_(2),
    "initialisation": lambda w: nn.init.normal_(w),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "out": lambda w: torch.add(torch.ones(6, 4), 1, out=w),
    "list": lambda w: torch._foreach_add_([w], 1.0),
    "item": set_item,
    "augmented": add_to,
    "data": set_data,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_refused_for_it_would_be_lost(change):
    layer = random_layer(6, 4, 2)
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="nobody keeps; change the U and Vh"):
        CHANGES[change](layer.weight)
    assert torch.equal(layer.weight, before)


def test_it_may_be_copied_into_another_tensor():
    layer = random_layer(6, 4, 2)
    target = torch.zeros(6, 4, dtype=torch.float64)
    with torch.no_grad():
        target.copy_(layer.weight)
        target += layer.weight
    assert_close(target, 2 * product_of(layer).detach())


def test_where_torch_function_is_off_it_still_is_the_product():
    layer = random_layer(6, 4, 2)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        assert_close(torch.add(layer.weight, 1), product_of(layer) + 1)


def test_the_weight_cannot_be_replaced():
    layer: Any = random_layer(6, 4, 2)
    with pytest.raises((AttributeError, KeyError, TypeError)):
        layer.weight = torch.zeros(6, 4)
    with pytest.raises((AttributeError, KeyError, TypeError)):
        layer.weight = nn.Parameter(torch.zeros(6, 4))
    assert_close(layer.weight + 0, product_of(layer))
