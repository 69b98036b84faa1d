"""SparseFactor against a dense B in float64, and what it keeps out of memory and optimizers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.lori_fixtures import same_bits
from support.reference import tolerance
from support.strategies import seeds, shapes
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from peft_svdinit.tuner.layers.sparse_factor import SparseFactor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def some_mask(rows: int, rank: int, *, seed: int = 0, share: float = 0.3) -> Tensor:
    """A random mask that keeps at least one entry."""
    mask = torch.rand(rows, rank, generator=torch.Generator().manual_seed(seed)) < share
    mask.view(-1)[seed % mask.numel()] = True
    return mask


def filled(
    mask: Tensor, start: Tensor | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 1
) -> SparseFactor:
    """A factor whose values are not zero."""
    factor = SparseFactor(mask, start, dtype=dtype)
    with torch.no_grad():
        factor.values.copy_(normal(len(factor.values), seed=seed))
    return factor


def dense_of(factor: SparseFactor, mask: Tensor, start: Tensor | None) -> Tensor:
    """The slow twin: loop over the mask and place the values one by one."""
    dense = torch.zeros(mask.shape, dtype=factor.values.dtype) if start is None else start.clone()
    values = iter(factor.values.detach())
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if mask[row, column]:
                dense[row, column] = next(values)
    return dense


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    """A mask of any shape and density, a start or none, and a number of rows of x."""
    rows, rank = draw(shapes(9))
    seed = draw(seeds)
    mask = some_mask(rows, rank, seed=seed, share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    start = normal(rows, rank, seed=seed) if draw(st.booleans()) else None
    return mask, start, draw(st.integers(0, 5))


@given(case=cases())
def test_the_forward_pass_and_all_gradients_are_those_of_the_dense_b(case):
    mask, start, batch = case
    factor = filled(mask, start)
    dense = dense_of(factor, mask, start).requires_grad_()
    assert torch.equal(factor.weight, dense)
    x, upstream = normal(batch, mask.shape[1], seed=2), normal(batch, mask.shape[0], seed=3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = factor(ours), linear(theirs, dense)
    assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    assert factor.values.grad is not None and dense.grad is not None
    assert_close(ours.grad, theirs.grad)
    assert_close(factor.values.grad, dense.grad[mask])


@given(case=cases())
def test_gradients_reach_the_values_through_the_dense_weight(case):
    mask, start, _ = case
    factor = filled(mask, start)
    upstream = normal(*mask.shape, seed=4)
    (factor.weight * upstream).sum().backward()
    assert factor.values.grad is not None
    assert torch.equal(factor.values.grad, upstream[mask])


@pytest.mark.parametrize("with_start", [False, True])
def test_both_ways_pass_gradcheck_in_float64(with_start):
    mask = some_mask(5, 3)
    factor = filled(mask, normal(5, 3) if with_start else None)

    def through_forward(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(factor, {"values": values}, (x,))

    x = normal(2, 4, 3, seed=5).requires_grad_()
    values = normal(len(factor.values), seed=6).requires_grad_()
    assert gradcheck(through_forward, (x, values))
    assert gradcheck(lambda given: factor.dense(given) * 2, (values,))


@given(case=cases())
def test_the_trained_entries_of_the_dense_b_are_the_values(case):
    mask, start, _ = case
    factor = filled(mask, start)
    assert torch.equal(factor.mask, mask)
    assert torch.equal(factor.sparse(factor.weight.detach()), factor.values)


def test_an_entry_off_the_mask_that_differs_is_refused():
    mask = some_mask(5, 3)
    factor = filled(mask, normal(5, 3))
    weight = factor.weight.detach().clone()
    weight[tuple((~mask).nonzero()[0])] += 1
    with pytest.raises(ValueError, match="1 other entries off the mask"):
        factor.sparse(weight)
    with pytest.raises(ValueError, match=r"shape \(3, 5\), expected \(5, 3\)"):
        factor.sparse(weight.mT)


def test_a_mask_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps no entry"):
        SparseFactor(torch.zeros(3, 2, dtype=torch.bool))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_and_values_agree_with_float64_within_their_rounding(dtype):
    mask, start = some_mask(12, 6), normal(12, 6)
    factor = filled(mask, start, dtype=dtype)
    dense = dense_of(factor, mask, start.to(dtype)).double().requires_grad_()
    x = normal(7, 6, seed=2, dtype=dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, expected = factor(x), linear(wide, dense)
    assert found.dtype == dtype
    found.sum().backward()
    expected.sum().backward()
    assert factor.values.grad is not None and dense.grad is not None
    allowed: Any = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    assert_close(found.double(), expected, **allowed)
    assert_close(x.grad.double(), wide.grad, **allowed)  # pyright: ignore
    assert_close(factor.values.grad.double(), dense.grad[mask], **allowed)


def test_under_autocast_the_values_stay_wide_and_the_product_is_the_dense_layers():
    mask = some_mask(12, 6)
    factor = filled(mask, dtype=torch.float32)
    dense = dense_of(factor, mask, None).requires_grad_()
    x = normal(7, 6, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = factor(ours), linear(theirs, dense)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert factor.values.grad is not None and dense.grad is not None
    assert factor.values.grad.dtype == torch.float32
    assert torch.equal(factor.values.grad, dense.grad[mask])
    assert ours.grad is not None and ours.grad.dtype == torch.float32
    assert theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


# Memory


def saved_numbers(function, *arguments: Tensor) -> list[int]:
    """Sizes of the tensors that a call saves for its backward pass."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*arguments)
    return sizes


def test_no_dense_b_is_saved_for_the_backward_pass():
    mask = some_mask(40, 10, share=0.1)
    factor = filled(mask)
    x = normal(3, 10).requires_grad_()
    kept = len(factor.values)
    assert sorted(saved_numbers(factor, x)) == sorted([x.numel(), kept, kept])
    assert saved_numbers(lambda: factor.weight) == [kept]
    # What the test would see: a dense B of 400 numbers.
    assert 400 in saved_numbers(lambda x: linear(x, factor.weight), x)


def test_gradient_checkpointing_changes_no_bit():
    mask = some_mask(12, 6)
    gradients = []
    for reentrant in (None, False, True):
        factor = filled(mask)
        x = normal(4, 6, seed=2).requires_grad_()
        out = factor(x) if reentrant is None else checkpoint(factor, x, use_reentrant=reentrant)
        out.square().sum().backward()
        gradients.append((x.grad, factor.values.grad))
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


def test_gradients_accumulate_over_backward_passes():
    factor, whole = filled(some_mask(12, 6)), filled(some_mask(12, 6))
    x = normal(6, 6, seed=2)
    for part in x.split(2):
        factor(part).square().sum().backward()
    whole(x).square().sum().backward()
    assert factor.values.grad is not None
    assert_close(factor.values.grad, whole.values.grad, **tolerance(x))


# Optimizers


def optimizers(parameters: list[Tensor]) -> Iterator[torch.optim.Optimizer]:
    yield torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    yield torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    yield torch.optim.Adam(parameters, lr=0.1, weight_decay=0.5, amsgrad=True)


@pytest.mark.parametrize("which", range(3), ids=["AdamW", "SGD", "Adam"])
@pytest.mark.parametrize("with_start", [False, True])
def test_entries_off_the_mask_keep_every_bit_whatever_the_optimizer(which, with_start):
    mask = some_mask(12, 6)
    start = normal(12, 6, dtype=torch.float32) if with_start else None
    factor = SparseFactor(mask, start)
    optimizer = list(optimizers(list(factor.parameters())))[which]
    initial = factor.weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        (factor(normal(3, 6, seed=step, dtype=torch.float32)) - 1).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(factor.parameters(), 1.0)
        optimizer.step()
    now = factor.weight.detach()
    assert same_bits(now[~mask], initial[~mask])
    assert (now[mask] != initial[mask]).all()


def test_the_steps_are_those_of_a_dense_b_whose_gradient_is_masked():
    """Without weight decay, with which the dense way would also shrink what it must not."""
    mask, start = some_mask(12, 6), normal(12, 6)
    factor = SparseFactor(mask, start, dtype=torch.float64)
    dense = start.clone().requires_grad_()
    ours = torch.optim.AdamW(factor.parameters(), lr=0.1, weight_decay=0)
    theirs = torch.optim.AdamW([dense], lr=0.1, weight_decay=0)
    for step in range(5):
        x = normal(3, 6, seed=step)
        for optimizer, out in ((ours, factor(x)), (theirs, linear(x, dense))):
            optimizer.zero_grad()
            (out - 1).square().sum().backward()
        assert dense.grad is not None
        dense.grad *= mask
        ours.step()
        theirs.step()
    assert_close(factor.weight.detach(), dense.detach(), **tolerance(dense))


def test_the_state_of_8_bit_optimizers_is_that_of_the_trained_entries():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    mask = some_mask(128, 64, share=0.6)
    factor = SparseFactor(mask)
    # What a Trainer asked for is kept by the identity of parameters, which come and go.
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    try:
        optimizer = bitsandbytes.optim.AdamW8bit(factor.parameters(), lr=0.1, min_8bit_size=1)
        factor(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit optimizer on this CPU: {error}")
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].shape == state["state2"].shape == (int(mask.sum()),)
    assert not factor.weight.detach()[~mask].any()


# Moving and copying


def test_a_deep_copy_shares_nothing():
    mask, start = some_mask(5, 3), normal(5, 3)
    factor = filled(mask, start)
    twin = copy.deepcopy(factor)
    expected = twin.weight.detach().clone()
    with torch.no_grad():
        factor.values.zero_()
        factor.indices.zero_()
        assert factor.frozen is not None
        factor.frozen.zero_()
    assert torch.equal(twin.weight, expected)


def test_a_narrower_copy_holds_rounded_values_and_the_same_mask():
    mask, start = some_mask(5, 3), normal(5, 3)
    factor = filled(mask, start)
    expected = factor.weight.detach().to(torch.bfloat16)
    narrow = factor.to(torch.bfloat16)
    assert narrow.values.dtype == torch.bfloat16 and narrow.indices.dtype == torch.int32
    assert torch.equal(narrow.weight, expected)


def test_on_the_meta_device_shapes_are_right_and_the_mask_is_kept():
    mask, start = some_mask(5, 3), normal(5, 3)
    factor = SparseFactor(mask, start, dtype=torch.float64).to("meta")
    assert factor.weight.shape == (5, 3) and factor.weight.is_meta
    out = factor(torch.zeros(2, 3, device="meta", dtype=torch.float64))
    assert out.shape == (2, 5) and out.is_meta
    again = factor.to_empty(device="cpu")
    with torch.no_grad():
        again.values.copy_(start[mask])
    assert torch.equal(again.weight, start)


def test_values_moved_without_the_module_are_followed_by_the_mask():
    """Offloading hooks move parameters one by one."""
    factor = filled(some_mask(5, 3), normal(5, 3))
    factor._parameters["values"] = torch.nn.Parameter(factor.values.detach().to("meta"))
    x = torch.zeros(2, 3, device="meta", dtype=torch.float64, requires_grad=True)
    factor(x).sum().backward()
    assert factor.values.grad is not None and factor.values.grad.is_meta
    factor.weight.sum().backward()


def test_the_only_parameter_is_the_values_and_there_is_no_buffer():
    """Buffers would be broadcast by DistributedDataParallel at every step."""
    factor = SparseFactor(some_mask(5, 3), normal(5, 3))
    assert [name for name, _ in factor.named_parameters()] == ["values"]
    assert not list(factor.buffers())
    assert f"trained={len(factor.values)} of 15" in repr(factor)


# State dicts


def test_a_state_dict_restores_the_values():
    mask, start = some_mask(5, 3), normal(5, 3)
    saved, fresh = filled(mask, start), SparseFactor(mask, start, dtype=torch.float64)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.weight, saved.weight)


def test_the_values_of_another_mask_or_start_are_refused_though_their_number_fits():
    mask = some_mask(5, 3)
    parent = torch.nn.ModuleDict({"layer": filled(mask, normal(5, 3))})
    for other in (SparseFactor(mask.flip(0), normal(5, 3)), SparseFactor(mask, normal(5, 3) + 1)):
        assert len(other.values) == int(mask.sum())
        target = torch.nn.ModuleDict({"layer": other})
        with pytest.raises(ValueError, match=r"layer: .*another mask.*lori_mask, lori_seed"):
            target.load_state_dict(parent.state_dict())


_COMPILED = """
import torch
from peft_svdinit.tuner.layers.sparse_factor import SparseFactor

torch.manual_seed(0)
mask = torch.rand(12, 6) < 0.3
factor = SparseFactor(mask, torch.randn(12, 6))
x = torch.randn(4, 6, requires_grad=True)
gradients = []
for function in (factor, torch.compile(factor, backend="aot_eager", fullgraph=True)):
    function(x).square().sum().backward()
    gradients.append((x.grad, factor.values.grad))
    x.grad = factor.values.grad = None
for found, expected in zip(*gradients):
    torch.testing.assert_close(found, expected)
"""


@pytest.mark.slow
def test_it_compiles_without_a_graph_break():
    """In a process of its own: the types that this suite checks are not for the compiler."""
    run = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
