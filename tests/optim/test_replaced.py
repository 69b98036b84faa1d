"""Parameters replaced in an optimizer: the groups of a fresh one, the states that there were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.low_rank_cases import switch
from support.peft_fixtures import tiny_base, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from peft_svdinit.low_rank import LowRankLinear, LowRankPlan, PlannedLayer, rebalance_, shrink_
from peft_svdinit.optim import Moved, replace_parameters_

Optimizer = torch.optim.Optimizer


def trainer(model: Any, folder: Path, weight_decay: float = 0.01) -> Trainer:
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "learning_rate": 1e-2}
    return Trainer(model, TrainingArguments(str(folder), weight_decay=weight_decay, **options))


def spared(run: Trainer) -> list[nn.Parameter]:
    model: Any = run.model
    decayed = set(run.get_decay_parameter_names(model))
    return [p for name, p in model.named_parameters() if name not in decayed]


def step(model: Any, optimizer: Optimizer, times: int = 1) -> None:
    for seed in range(times):
        optimizer.zero_grad()
        model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        optimizer.step()


def identities(optimizer: Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def check_like_fresh(optimizer: Optimizer, run: Trainer, folder: Path) -> None:
    """Groups of the very parameters, in the very order, that a new Trainer of the model makes."""
    fresh = trainer(run.model, folder, run.args.weight_decay).create_optimizer()
    assert identities(optimizer) == identities(fresh)
    for ours, theirs in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert ours["weight_decay"] == theirs["weight_decay"] and ours["lr"] == theirs["lr"]
    model: Any = run.model
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} <= trained


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("train_norms", [False, True])
@pytest.mark.parametrize("state", ["project", "drop"])
def test_groups_are_those_of_a_fresh_trainer_and_other_states_stay(
    architecture, weight_decay, train_norms, state, tmp_path
):
    model: Any = tiny_base(architecture)
    run = trainer(model, tmp_path, weight_decay)
    optimizer: Any = run.create_optimizer()
    step(model, optimizer, 2)
    kept = dict(optimizer.state.items())
    switched = switch(model, train_norms=train_norms)
    moved = [each.moved for each in switched]
    replace_parameters_(optimizer, list(model.parameters()), moved, state=state, spared=spared(run))
    check_like_fresh(optimizer, run, tmp_path)
    old = {id(p) for each in moved for p in each.old}
    assert len(old) == len(switched)
    for parameter, found in kept.items():
        if id(parameter) in old:
            assert parameter not in optimizer.state
        else:
            assert optimizer.state[parameter] is found
    for each in switched:
        weight = each.moved.old[0]
        for parameter in each.moved.new:
            found = optimizer.state.get(parameter)
            if state == "drop":
                assert not found
                continue
            assert set(found) == set(kept[weight]) and float(found["step"]) == 2
            assert found["exp_avg"].shape == parameter.shape
            assert found["exp_avg"].is_contiguous()
        if state == "project":
            first = kept[weight]["exp_avg"]
            first = first.mT if each.layer.transposed else first
            (of_U, of_Vh, *_) = (optimizer.state[p]["exp_avg"] for p in each.moved.new)
            if not train_norms:
                assert_close(of_U, first @ each.layer.Vh.mT)
                assert_close(of_Vh, each.layer.U.mT @ first)
    before = [each.layer.U.detach().clone() for each in switched]
    step(model, optimizer)
    assert all(not torch.equal(each.layer.U, U) for each, U in zip(switched, before, strict=True))


def test_counts_of_steps_are_no_common_tensor():
    model: Any = tiny_base()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    (first, *_) = moved = [each.moved for each in switch(model)]
    replace_parameters_(optimizer, list(model.parameters()), moved)
    counts = [optimizer.state[p]["step"] for p in first.new]
    counts[0] += 1
    assert float(counts[1]) == 1


@pytest.mark.parametrize("change", ["rebalance", "shrink"])
@pytest.mark.parametrize("state", ["project", "drop"])
def test_a_later_change_keeps_the_order_of_a_fresh_trainer(change, state, tmp_path):
    model: Any = tiny_base("gpt2")
    switched = switch(model)
    run = trainer(model, tmp_path)
    optimizer: Any = run.create_optimizer()
    step(model, optimizer)
    groups = identities(optimizer)
    if change == "rebalance":
        changed = rebalance_(model)
    else:
        name, layer = switched[3].name, switched[3].layer
        plan = LowRankPlan({name: PlannedLayer(1, (layer.out_features, layer.in_features))})
        changed = shrink_(model, plan)
    replace_parameters_(
        optimizer,
        list(model.parameters()),
        [each.moved for each in changed],
        state=state,
        spared=spared(run),
    )
    check_like_fresh(optimizer, run, tmp_path)
    assert (identities(optimizer) == groups) == (change == "rebalance")
    for each in changed:
        for parameter in each.moved.new:
            assert bool(optimizer.state.get(parameter)) == (state == "project")
    step(model, optimizer)


def test_trained_norms_stay_without_decay_when_they_are_replaced(tmp_path):
    model: Any = tiny_base()
    switched = switch(model, train_norms=True)
    run = trainer(model, tmp_path)
    optimizer: Any = run.create_optimizer()
    step(model, optimizer)
    layer = switched[0].layer
    plan = LowRankPlan({switched[0].name: PlannedLayer(1, (layer.out_features, layer.in_features))})
    (changed,) = shrink_(model, plan)
    before = copy.deepcopy(identities(optimizer)), dict(optimizer.state)
    with pytest.raises(TypeError, match="trained norms cannot be carried over"):
        replace_parameters_(optimizer, list(model.parameters()), [changed.moved])
    assert (identities(optimizer), dict(optimizer.state)) == before
    replace_parameters_(
        optimizer, list(model.parameters()), [changed.moved], state="drop", spared=spared(run)
    )
    check_like_fresh(optimizer, run, tmp_path)


class EightBit(torch.optim.SGD):
    """Keeps what bitsandbytes' 8-bit AdamW keeps, which needs a GPU for some of its sizes."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                flat = torch.zeros(p.numel(), dtype=torch.uint8)
                self.state[p] = {"step": 1, "state1": flat, "state2": flat.clone()}


class Flat(torch.optim.AdamW):
    """Keeps its moments in other shapes than the parameters'."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].flatten()


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW has max_exp_avg_sq"),
    "adafactor": (lambda p: Adafactor(p), "Adafactor has RMS, exp_avg_sq_col, exp_avg_sq_row"),
    "8 bits": (lambda p: EightBit(p, lr=0.1), "EightBit has state1, state2"),
    "adamax": (lambda p: torch.optim.Adamax(p), "Adamax has exp_inf"),
    "centred": (lambda p: torch.optim.RMSprop(p, centered=True), "RMSprop has grad_avg"),
    "flat": (lambda p: Flat(p), r"exp_avg of Flat is \(256,\) for a weight of \(16, 16\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_cannot_be_carried_is_refused_and_nothing_changed(name):
    build, message = REFUSED[name]
    model: Any = tiny_base()
    optimizer = build(model.parameters())
    step(model, optimizer)
    moved = [each.moved for each in switch(model)]
    before = identities(optimizer), {id(p): id(state) for p, state in optimizer.state.items()}
    with pytest.raises(TypeError, match=message) as raised:
        replace_parameters_(optimizer, list(model.parameters()), moved)
    assert "optimizer_state=drop" in str(raised.value)
    after = identities(optimizer), {id(p): id(state) for p, state in optimizer.state.items()}
    assert after == before
    replace_parameters_(optimizer, list(model.parameters()), moved, state="drop")
    assert identities(optimizer) == [[id(p) for p in model.parameters()]]
    assert not any(p in optimizer.state for each in moved for p in (*each.old, *each.new))
    if name != "flat":
        step(model, optimizer)


CARRIED: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("stepped", [False, True])
def test_optimizers_of_first_and_second_moments_go_on(name, stepped):
    model: Any = tiny_base("gpt2")
    optimizer = CARRIED[name](model.parameters())
    if stepped:
        step(model, optimizer)
    kinds = {tuple(optimizer.state[p]) for p in model.parameters() if optimizer.state.get(p)}
    moved = [each.moved for each in switch(model)]
    replace_parameters_(optimizer, list(model.parameters()), moved)
    again = {tuple(optimizer.state[p]) for p in model.parameters() if optimizer.state.get(p)}
    assert again == kinds
    step(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_moments_keep_the_dtype_that_they_had():
    model: Any = tiny_base().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    moved = [each.moved for each in switch(model)]
    replace_parameters_(optimizer, list(model.parameters()), moved)
    for each in moved:
        assert {optimizer.state[p]["exp_avg"].dtype for p in each.new} == {torch.bfloat16}


def test_layers_of_different_groups_stay_in_theirs_at_their_rates():
    model: Any = tiny_base()
    attention, rest = [], []
    for name, parameter in model.named_parameters():
        (attention if "self_attn" in name else rest).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": 1e-3}, {"params": attention, "lr": 1e-2, "weight_decay": 0.0}]
    )
    step(model, optimizer)
    switched = switch(model, train_norms=True)
    # Another rate: no vector may go there for its lack of weight decay.
    replace_parameters_(
        optimizer, list(model.parameters()), [each.moved for each in switched], spared=attention
    )
    expected: list[list[int]] = [[], []]
    for name, parameter in model.named_parameters():
        expected["self_attn" in name].append(id(parameter))
    assert identities(optimizer) == expected


def test_frozen_layers_need_no_group_and_one_that_is_held_stays_held():
    model: Any = tiny_base()
    frozen = [p for n, p in model.named_parameters() if "layers.0" in n and "proj" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for held in (False, True):
        other = copy.deepcopy(model)
        given = [p for p in other.parameters() if held or p.requires_grad]
        optimizer = torch.optim.AdamW(given, lr=1e-3)
        step(other, optimizer)
        moved = [each.moved for each in switch(other)]
        replace_parameters_(optimizer, list(other.parameters()), moved)
        wanted = [id(p) for p in other.parameters() if held or p.requires_grad]
        assert identities(optimizer) == [wanted]
        replace_parameters_(
            optimizer, list(other.parameters()), [each.moved for each in rebalance_(other)]
        )
        assert identities(optimizer) == [wanted]
        step(other, optimizer)


@pytest.mark.parametrize("state", ["project", "drop"])
def test_a_layer_that_the_optimizer_lacks_is_refused_by_name_and_nothing_changed(state):
    model: Any = tiny_base()
    left_out = "model.layers.1.mlp.up_proj"
    given = [p for name, p in model.named_parameters() if not name.startswith(left_out)]
    optimizer = torch.optim.AdamW(given, lr=1e-3)
    step(model, optimizer)
    before = identities(optimizer)
    moved = [each.moved for each in switch(model)]
    with pytest.raises(ValueError, match=rf"layer {left_out}: the optimizer does not hold"):
        replace_parameters_(optimizer, list(model.parameters()), moved, state=state)
    assert identities(optimizer) == before and len(optimizer.state) == len(given)


def test_states_of_different_kinds_are_refused():
    layer = LowRankLinear(torch.ones(3, 2), torch.ones(2, 4))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer.U.grad = torch.ones(3, 2)
    optimizer.step()

    def carry(moments: Any, squared: bool) -> Any:
        pytest.fail("called")

    pair = (layer.U, layer.Vh)
    for old in (pair, pair[::-1]):
        with pytest.raises(TypeError, match="layer q: its parameters have states of different"):
            replace_parameters_(optimizer, list(layer.parameters()), [Moved("q", old, old, carry)])


def test_what_no_model_holds_goes_last():
    kept, old, new = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    own = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([own, kept, old], lr=0.1)

    def carry(moments: Any, squared: bool) -> list[Tensor]:
        return list(moments)

    replace_parameters_(optimizer, [new, kept], [Moved("q", (old,), (new,), carry)])
    assert identities(optimizer) == [[id(new), id(kept), id(own)]]
