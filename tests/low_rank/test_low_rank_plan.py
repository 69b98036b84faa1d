"""Plans of ranks: of which layers, of which model, and as JSON."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank_cases import switch
from support.strategies import layer_names
from support.tiny_models import tiny_model

from peft_svdinit.low_rank import LowRankPlan, LowRankRule, PlannedLayer, factorize_, make_plan


@st.composite
def planned_layers(draw: st.DrawFn) -> PlannedLayer:
    shape = draw(st.tuples(st.integers(1, 99), st.integers(1, 99)))
    return PlannedLayer(draw(st.integers(1, min(shape))), shape)


@given(layers=st.dictionaries(layer_names, planned_layers(), min_size=1))
def test_a_plan_comes_back_from_json_with_its_numbers(layers):
    plan = LowRankPlan(layers)
    again = LowRankPlan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan and list(again.layers) == list(layers)
    assert again.ranks == {name: layer.rank for name, layer in layers.items()}
    assert again.dense_parameters == sum(out * inner for out, inner in map(_shape, layers.values()))
    assert again.parameters == sum(each.rank * sum(each.shape) for each in layers.values())


def _shape(layer: PlannedLayer) -> tuple[int, int]:
    return layer.shape


def test_the_summary_says_what_is_saved():
    plan = LowRankPlan({"a": PlannedLayer(8, (64, 32)), "b": PlannedLayer(4, (32, 32))})
    assert plan.summary() == (
        "2 layers at ranks 4 to 8: 3,072 weights become 1,024, 33% of the multiplications in these "
        "layers"
    )


GOOD = {"rank": 2, "shape": [8, 4]}


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"rank": 2},
        {**GOOD, "rank": "two"},
        {**GOOD, "rank": 1.5},
        {**GOOD, "rank": None},
        {**GOOD, "rank": 0},
        {**GOOD, "rank": 5},
        {**GOOD, "shape": [8]},
        {**GOOD, "shape": [8, 4, 2]},
        {**GOOD, "shape": 8},
        {**GOOD, "shape": ["8", "4"]},
        [2, [8, 4]],
        None,
    ],
)
def test_a_damaged_plan_is_refused_by_layer(damaged):
    with pytest.raises(ValueError, match=r"damaged plan .*: layer h\.1 "):
        LowRankPlan.from_dict({"h.0": GOOD, "h.1": damaged})


@pytest.mark.parametrize("damaged", [[GOOD], None, 3, "h.0"])
def test_what_is_no_plan_is_refused(damaged):
    with pytest.raises(ValueError, match="damaged plan"):
        LowRankPlan.from_dict(damaged)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_beyond_the_matrix_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 4\] .* got {rank}"):
        PlannedLayer(rank, (8, 4))


Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "the plan names no layer"),
        ({"h.0.attn": PlannedLayer(1, (2, 2))}, r"layer h\.0\.attn, which LlamaForCausalLM lacks"),
        ({Q: PlannedLayer(1, (16, 8))}, r"q_proj has a weight of \(16, 16\), the plan is for"),
        ({"model.norm": PlannedLayer(1, (16, 8))}, "norm is no linear layer, the plan is for"),
    ],
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(layers, message):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        factorize_(model, LowRankPlan({K: PlannedLayer(1, (8, 16)), **layers} if layers else {}))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_plan_of_a_switched_model_is_the_one_it_was_switched_by(architecture):
    model = tiny_model(architecture)
    plan = make_plan(model, LowRankRule(ratio=0.25, multiple_of=2))
    plan.check(model)
    switch(model)
    assert LowRankPlan.of(model).layers == plan.layers
    LowRankPlan.of(model).check(model)
    assert LowRankPlan.of(tiny_model()).layers == {}
