"""Rules of ranks: each way exact, where low rank is cheaper, and refusals of what is no rule."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import reference
from support.low_rank_cases import switch
from support.strategies import matrix_of_spectrum, seeds, spectra
from support.tiny_models import tiny_model
from torch import Tensor, nn

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    low_rank_layers,
    make_plan,
    plan_to_shrink,
    shrink_,
    stable_ranks,
)
from peft_svdinit.low_rank.rule import ratio_for

steps = st.sampled_from([1, 2, 3, 8])
shares = st.sampled_from(["0.5", "0.7", "0.8", "0.9", "1"])


def highest(shape: tuple[int, int], share: str, step: int) -> int:
    """The highest multiple within a share of break-even, in exact fractions."""
    return int(Fraction(share) * shape[0] * shape[1] / sum(shape)) // step * step


def layers_of(weights: dict[str, Tensor]) -> nn.Module:
    model = nn.ModuleDict()
    for name, weight in weights.items():
        model[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model[name].weight.data = weight.float()
    return model


def planned(model: nn.Module, rule: LowRankRule) -> LowRankPlan | None:
    """None where no layer is cheaper."""
    try:
        return make_plan(model, rule)
    except ValueError as error:
        assert "no layer is cheaper" in str(error)
        return None


sides = st.one_of(st.integers(1, 60), st.sampled_from([80, 240, 320, 1024]))


@example(shape=(80, 60), ratio=40, share="0.7", step=8)
@given(shape=st.tuples(sides, sides), ratio=st.integers(1, 99), share=shares, step=steps)
def test_a_ratio_is_rounded_down_to_multiples_and_bounded_exactly(shape, ratio, share, step):
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(shape[1], shape[0])})
    rule = LowRankRule(ratio=ratio / 100, max_share=float(share), multiple_of=step)
    exact = max(step, int(Fraction(ratio, 100) * min(shape)) // step * step)
    plan = planned(model, rule)
    if exact <= highest(shape, share, step):
        assert plan is not None and plan.ranks == {"a": exact}
        assert plan.layers["a"].shape == shape
        assert plan.parameters == exact * sum(shape) <= float(share) * shape[0] * shape[1] + 1e-6
    else:
        assert plan is None


NAMES = {
    "h.0.attn.c_attn": "attention",
    "encoder.layer.0.attention.output.dense": "attention",
    "decoder.block.0.layer.0.SelfAttention.q": "attention",
    "model.layers.0.self_attn.q_proj": "attention",
    "encoder.layer.0.output.dense": "feed_forward",
    "model.layers.0.mlp.down_proj": "feed_forward",
    "backbone.layers.0.mixer.in_proj": "feed_forward",
    "layers.0.attention": "feed_forward",
}


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_what_lies_within_a_module_that_is_called_so(name):
    kinds = {"attention": 0.1, "feed_forward": 0.2}
    assert ratio_for(name, kinds) == kinds[NAMES[name]]
    assert ratio_for(name, {"": 0.3}) == 0.3
    other = {"attention", "feed_forward"} - {NAMES[name]}
    assert ratio_for(name, dict.fromkeys(other, 0.1)) is None


def test_the_first_key_that_fits_counts_and_a_name_is_one_or_ends_so():
    name = "model.layers.0.self_attn.q_proj"
    assert ratio_for(name, {"q_proj": 0.1, "attention": 0.2}) == 0.1
    assert ratio_for(name, {"attention": 0.2, "q_proj": 0.1}) == 0.2
    assert ratio_for(name, {"self_attn.q_proj": 0.3}) == ratio_for(name, {name: 0.3}) == 0.3
    assert ratio_for(name, {"proj": 0.1, "0.self_attn": 0.1, "layers": 0.1}) is None
    # A layer that is called like a kind is not meant by it.
    assert ratio_for("x.feed_forward.attention", {"attention": 0.1}) is None


def test_ratios_by_kind_and_by_name_reach_the_layers_and_others_stay_dense():
    model = tiny_model()
    plan = make_plan(
        model, LowRankRule(ratio={"v_proj": 0.5, "attention": 0.25}, multiple_of=1, max_share=1)
    )
    endings = {name.rpartition(".")[2]: rank for name, rank in plan.ranks.items()}
    assert endings == {"q_proj": 4, "k_proj": 2, "v_proj": 4, "o_proj": 4}
    assert plan.dense["model.layers.1.mlp.up_proj"] == "no key of ratio fits it"
    with pytest.raises(ValueError, match="ratio: no layer has the name 'atention'"):
        make_plan(model, LowRankRule(ratio={"atention": 0.25, "feed_forward": 0.1}))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([(24, 20), (20, 24), (12, 30)]))
    return matrix_of_spectrum(shape, draw(spectra(min(shape))), draw(seeds)).float()


@given(weight=weights(), energy=st.floats(0.01, 0.99), step=steps, share=shares)
def test_an_energy_gets_the_smallest_multiple_that_keeps_it(weight, energy, step, share):
    squares = reference.singular_values(weight) ** 2
    total = squares.sum()
    shape = (weight.shape[0], weight.shape[1])
    most = highest(shape, share, step)
    rule = LowRankRule(energy=energy, multiple_of=step, max_share=float(share))
    plan = planned(layers_of({"a": weight}), rule)

    def lost(rank: int) -> float:
        return float(squares[rank:].sum() / total) if total else 0.0

    # A hundredth of what may be lost and float32 are the slack of every energy of this package.
    limit = (1 - energy) * 1.01 + 3e-6
    if plan is None:
        assert most < step or lost(most) > (1 - energy) * 0.99 - 3e-6
        return
    rank = plan.ranks["a"]
    assert step <= rank <= most and rank % step == 0
    assert lost(rank) <= limit
    assert rank == step or lost(rank - step) > (1 - energy) - 3e-6


@given(weight=weights(), factor=st.floats(0.2, 3.0), step=steps)
def test_a_stable_rank_is_scaled_and_rounded_up(weight, factor, step):
    S = reference.singular_values(weight)
    exact = factor * float((S**2).sum() / S[0] ** 2) if S[0] else 0.0
    model = layers_of({"a": weight})
    assert stable_ranks(model, LowRankRule(stable_rank=1.0))["a"] == pytest.approx(
        exact / factor, rel=1e-4
    )
    plan = planned(model, LowRankRule(stable_rank=factor, multiple_of=step, max_share=1.0))
    allowed = {
        max(step, math.ceil(value / step) * step) for value in (0.9999 * exact, 1.0001 * exact)
    }
    most = highest((weight.shape[0], weight.shape[1]), "1", step)
    if plan is None:
        assert max(allowed) > most
    else:
        assert plan.ranks["a"] in allowed and plan.ranks["a"] <= most


def kept(model: nn.ModuleDict, ranks: dict[str, int]) -> float:
    """Energy that these ranks keep, by float64 singular values."""
    return sum(
        float((reference.singular_values(model[name].weight)[:rank] ** 2).sum())  # pyright: ignore
        for name, rank in ranks.items()
    )


def shape_in(model: nn.ModuleDict, name: str) -> tuple[int, int]:
    weight = model[name].weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def price(model: nn.ModuleDict, ranks: dict[str, int]) -> int:
    return sum(rank * sum(shape_in(model, name)) for name, rank in ranks.items())


def assignments(model: nn.ModuleDict, step: int, budget: int) -> list[dict[str, int]]:
    choices = [range(step, highest(shape_in(model, n), "1", step) + 1, step) for n in model]
    every = (dict(zip(model, ranks, strict=True)) for ranks in itertools.product(*choices))
    return [ranks for ranks in every if price(model, ranks) <= budget]


@st.composite
def budgets(draw: st.DrawFn, *, one_shape: bool) -> tuple[nn.ModuleDict, int, LowRankRule]:
    """Three tiny layers, the step and a rule whose budget pays for the least ranks."""
    step = draw(st.sampled_from([1, 2]))
    shapes = st.just((8, 8)) if one_shape else st.tuples(st.integers(5, 9), st.integers(5, 9))
    found = {}
    for name in "abc":
        shape = draw(shapes)
        found[name] = matrix_of_spectrum(shape, draw(spectra(min(shape))), draw(seeds))
    model = layers_of(found)
    assert isinstance(model, nn.ModuleDict)
    budget = price(model, dict.fromkeys(model, step)) + draw(st.integers(0, 150))
    return model, step, LowRankRule(max_parameters=budget, multiple_of=step, max_share=1.0)


@given(case=budgets(one_shape=True))
def test_with_layers_of_one_shape_no_ranks_within_the_budget_keep_more(case):
    model, step, rule = case
    plan = make_plan(model, rule)
    assert plan.parameters == price(model, plan.ranks) <= rule.max_parameters
    best = max(kept(model, ranks) for ranks in assignments(model, step, rule.max_parameters))
    assert kept(model, plan.ranks) == pytest.approx(best, rel=1e-5)


@given(case=budgets(one_shape=False))
def test_no_ranks_with_as_few_parameters_keep_more(case):
    model, step, rule = case
    plan = make_plan(model, rule)
    assert plan.ranks in assignments(model, step, rule.max_parameters)
    best = max(kept(model, ranks) for ranks in assignments(model, step, plan.parameters))
    assert kept(model, plan.ranks) == pytest.approx(best, rel=1e-5)


def test_a_budget_gives_no_rank_above_the_share_nor_pays_for_less_than_the_least():
    model = layers_of({"a": torch.eye(64), "b": 100 * torch.eye(64)})
    plan = make_plan(model, LowRankRule(max_parameters=10**9))
    assert plan.ranks == {"a": 24, "b": 24}
    plan = make_plan(model, LowRankRule(max_parameters=4 * 8 * 128))
    assert plan.ranks == {"a": 8, "b": 24}
    with pytest.raises(ValueError, match=r"at least 2,048 .* 2 layers rank 8, got 2,047; raise"):
        make_plan(model, LowRankRule(max_parameters=2047))


def test_only_layers_above_the_size_threshold_are_switched():
    model = layers_of({"small": torch.eye(32), "large": torch.ones(32, 33)})
    plan = make_plan(model, LowRankRule(ratio=0.25, min_size=32 * 32))
    assert set(plan.ranks) == {"large"}
    assert plan.dense["small"] == "in·out is 1,024, not above min_size=1,024"
    assert set(stable_ranks(model, LowRankRule(stable_rank=1, min_size=32 * 32))) == {"large"}


def test_what_stays_dense_says_why():
    model = layers_of({"wide": torch.ones(64, 64), "thin": torch.ones(9, 64), "out": torch.eye(64)})
    plan = make_plan(model, LowRankRule(ratio={"wide": 0.25, "out": 0.5, "thin": 0.1}))
    assert plan.dense == {
        "thin": "too small for a rank of 8 to be cheaper",
        "out": "rank 32 is above 24, from where low rank is not cheaper",
    }
    plan = make_plan(model, LowRankRule(ratio=0.25, exclude_modules=["out"]))
    assert plan.dense["out"] == "excluded" and set(plan.ranks) == {"wide"}
    with pytest.raises(ValueError, match=r"no layer is cheaper .*: thin: too small"):
        make_plan(model, LowRankRule(ratio=0.25, target_modules=["thin"]))


def test_ranks_of_low_rank_layers_are_lowered_by_the_same_rules():
    model = tiny_model()
    switch(model, ratio=0.375, step=1)
    before = LowRankPlan.of(model)
    plan = plan_to_shrink(model, LowRankRule(ratio=0.25, multiple_of=1, target_modules=["q_proj"]))
    assert plan.ranks == {f"model.layers.{i}.self_attn.q_proj": 4 for i in (0, 1)}
    assert set(plan.dense) == before.ranks.keys() - plan.ranks.keys()
    shrink_(model, plan)
    assert LowRankPlan.of(model).ranks == {**before.ranks, **plan.ranks}
    budget = sum(2 * sum(layer.shape) for layer in before.layers.values())
    shrink_(model, plan_to_shrink(model, LowRankRule(max_parameters=budget, multiple_of=1)))
    assert LowRankPlan.of(model).parameters <= budget


@pytest.mark.parametrize(
    "rule",
    [
        LowRankRule(ratio=0.3, multiple_of=1),
        LowRankRule(ratio=0.01, exclude_modules=".*", multiple_of=1),
        # Layers of less than one multiple cannot be lowered, whatever the rule.
        LowRankRule(max_parameters=10**6),
        LowRankRule(energy=0.5),
    ],
)
def test_a_rule_that_lowers_nothing_is_refused(rule):
    model = tiny_model()
    switch(model, ratio=0.25, step=1)
    with pytest.raises(ValueError, match="no layer of low rank gets a lower rank"):
        plan_to_shrink(model, rule)
    with pytest.raises(ValueError, match="no layer of low rank that could be shrunk"):
        plan_to_shrink(tiny_model(), rule)


def test_an_energy_of_a_low_rank_layer_is_that_of_its_product():
    model = layers_of({"a": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))})
    switch(model, ratio=0.4, step=1)
    layer = low_rank_layers(model)["a"]
    squares = reference.singular_values(layer.weight + 0) ** 2
    expected = int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.7)) + 1
    plan = plan_to_shrink(model, LowRankRule(energy=0.7, multiple_of=1))
    assert plan.ranks == {"a": expected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of ratio, energy, stable_rank, max_parameters"),
        ({"ratio": 0.1, "energy": 0.9}, "exactly one .* ratio=0.1, energy=0.9"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\), got 0.0 for all layers"),
        ({"ratio": {"attention": 1.0}}, "got 1.0 for attention"),
        ({"ratio": {}}, "got an empty mapping"),
        ({"ratio": math.nan}, "ratio must be in"),
        ({"energy": 90}, "write 90 % as 0.9"),
        ({"energy": 1.0}, "energy must be in"),
        ({"stable_rank": 0.0}, "stable_rank must be positive"),
        ({"stable_rank": math.nan}, "stable_rank must be positive"),
        ({"max_parameters": 0}, "max_parameters must be at least 1"),
        ({"ratio": 0.1, "min_size": -1}, "min_size must be at least 0"),
        ({"ratio": 0.1, "multiple_of": 0}, "multiple_of must be at least 1"),
        ({"ratio": 0.1, "max_share": 0.0}, r"max_share must be in \(0, 1\]"),
        ({"ratio": 0.1, "max_share": 1.1}, "max_share must be in"),
    ],
)
def test_what_is_no_rule_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankRule(**options)


def test_rules_that_say_the_same_give_the_same_json():
    one = LowRankRule(ratio={"attention": 0.1}, target_modules=("q", "k"), exclude_modules=["v"])
    other = LowRankRule(ratio={"attention": 0.1}, target_modules=["q", "k"], exclude_modules=("v",))
    assert one.as_dict() == other.as_dict() == json.loads(json.dumps(one.as_dict()))
    assert LowRankRule(**json.loads(json.dumps(one.as_dict()))).as_dict() == one.as_dict()
