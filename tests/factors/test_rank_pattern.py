"""Recommended ranks: optimal for what they spend, within bounds, and exact for PEFT."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from support.reference import smallest_rank
from support.strategies import layer_factors, spectra

from peft_svdinit import LowRankFactors
from peft_svdinit.analysis.deltas.layers import analyze_layer
from peft_svdinit.factors import (
    RankRecommendation,
    RankRule,
    Spectrum,
    recommend_ranks,
    relative_spectra,
)
from peft_svdinit.factors.ranks import budget
from peft_svdinit.factors.spectrum import ENERGY_RESOLUTION


def of_spectrum(
    spectrum: list[float], shape: tuple[int, int] = (8, 8), norm: float | None = None
) -> LowRankFactors:
    """Factors with these singular values; the vectors are unit vectors."""
    S = torch.tensor(spectrum, dtype=torch.float64)
    U, Vh = torch.eye(shape[0], len(S)), torch.eye(len(S), shape[1])
    return LowRankFactors(U, S, Vh, norm=S.norm().item() if norm is None else norm)


def captured(factors: dict[str, LowRankFactors], ranks: dict[str, int]) -> float:
    """Share of all energy in the first triplets, from the definition."""
    total = math.fsum(layer.norm**2 for layer in factors.values())
    kept = math.fsum(
        value**2 for name, layer in factors.items() for value in layer.S[: ranks[name]].tolist()
    )
    return min(1.0, kept / total) if total else 1.0


def price(factors: dict[str, LowRankFactors], ranks: dict[str, int]) -> int:
    return sum(ranks[name] * sum(layer.shape) for name, layer in factors.items())


def brute_force(factors: dict[str, LowRankFactors], budget: int) -> float:
    """The most energy that any ranks within the budget capture."""
    choices = itertools.product(*(range(1, layer.rank + 1) for layer in factors.values()))
    assignments = (dict(zip(factors, ranks, strict=True)) for ranks in choices)
    return max(captured(factors, ranks) for ranks in assignments if price(factors, ranks) <= budget)


models = st.dictionaries(
    st.sampled_from([f"layers.{i}.q" for i in range(12)]), layer_factors(8), min_size=1, max_size=4
)


@st.composite
def small_models(draw: st.DrawFn, one_shape: bool) -> dict[str, LowRankFactors]:
    """Three layers of up to four triplets each, of one shape or of several."""
    shapes = st.just((6, 5)) if one_shape else st.tuples(st.integers(4, 9), st.integers(4, 9))
    return {
        name: of_spectrum(draw(spectra(draw(st.integers(1, 4)))), draw(shapes)) for name in "abc"
    }


def lowest_price(factors: dict[str, LowRankFactors]) -> int:
    return price(factors, dict.fromkeys(factors, 1))


@given(factors=small_models(one_shape=True), extra=st.integers(0, 100))
def test_with_layers_of_one_shape_no_ranks_within_the_budget_capture_more(factors, extra):
    budget = lowest_price(factors) + extra
    best = brute_force(factors, budget)
    assert recommend_ranks(factors, max_parameters=budget).energy == pytest.approx(best, abs=1e-9)


@given(factors=small_models(one_shape=False), extra=st.integers(0, 150))
def test_no_ranks_with_as_few_parameters_capture_more(factors, extra):
    found = recommend_ranks(factors, max_parameters=lowest_price(factors) + extra)
    assert found.energy == pytest.approx(brute_force(factors, found.parameters), abs=1e-9)


@given(factors=small_models(one_shape=False), extra=st.integers(0, 150))
def test_the_budget_optimum_is_missed_by_less_than_one_triplet(factors, extra):
    budget = lowest_price(factors) + extra
    found = recommend_ranks(factors, max_parameters=budget)
    total = math.fsum(layer.norm**2 for layer in factors.values())
    next_triplets = [
        layer.S[found.ranks[name]].item() ** 2
        for name, layer in factors.items()
        if layer.rank > found.ranks[name]
    ]
    missed = (brute_force(factors, budget) - found.energy) * total
    assert missed <= max(next_triplets, default=0.0) + 1e-9 * total


@given(factors=models, extra=st.integers(0, 300))
def test_energy_and_parameters_are_those_of_the_ranks_and_within_the_budget(factors, extra):
    budget = lowest_price(factors) + extra
    found = recommend_ranks(factors, max_parameters=budget)
    assert found.parameters == price(factors, found.ranks) <= budget
    assert 0 <= found.energy <= 1
    assert found.energy == pytest.approx(captured(factors, found.ranks), abs=2e-6)


@given(factors=models, extra=st.integers(0, 200), more=st.integers(0, 100))
def test_more_budget_never_lowers_a_rank(factors, extra, more):
    budget = lowest_price(factors) + extra
    small = recommend_ranks(factors, max_parameters=budget)
    large = recommend_ranks(factors, max_parameters=budget + more)
    assert all(small.ranks[name] <= large.ranks[name] for name in factors)
    assert small.energy <= large.energy


@given(factors=models, extra=st.integers(0, 300))
def test_uniform_ranks_of_the_same_price_capture_no_more(factors, extra):
    found = recommend_ranks(factors, max_parameters=lowest_price(factors) + extra)
    assert found.uniform_energy <= found.energy + 1e-9
    assert 1 <= found.uniform_rank <= max(layer.rank for layer in factors.values())


@given(factors=models, low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_an_energy_target_is_met_with_the_fewest_triplets_or_reported_missed(factors, low, high):
    low, high = sorted((low, high))
    modest, strict = (recommend_ranks(factors, energy=target) for target in (low, high))
    assert modest.parameters <= strict.parameters
    for found, target in ((modest, low), (strict, high)):
        assert found.reached == (found.energy >= target - 1e-6 - 1e-9)
        if not found.reached:
            assert found.limit == "held"


@given(factors=models, least=st.integers(1, 4), span=st.integers(0, 4))
def test_ranks_stay_within_their_bounds_and_what_is_held(factors, least, span):
    found = recommend_ranks(factors, energy=0.99, min_rank=least, max_rank=least + span)
    for name, layer in factors.items():
        assert min(least, layer.rank) <= found.ranks[name] <= min(least + span, layer.rank)


def test_a_whole_delta_reaches_all_of_its_energy_in_spite_of_rounding():
    generator = torch.Generator().manual_seed(0)
    factors = {
        str(i): LowRankFactors.from_delta(torch.randn(12, 9, generator=generator), 9)
        for i in range(3)
    }
    found = recommend_ranks(factors, energy=1.0)
    assert found.reached
    assert found.energy == pytest.approx(1.0, abs=1e-6)
    assert set(found.ranks.values()) == {9}


def test_what_ended_the_growth_is_named():
    factors = {"a": of_spectrum([3.0, 2.0, 1.0], norm=6.0), "b": of_spectrum([2.0, 1.0])}
    assert recommend_ranks(factors, energy=0.3).limit == "energy"
    assert recommend_ranks(factors, energy=0.99).limit == "held"
    assert recommend_ranks(factors, energy=0.99, max_rank=1).limit == "max_rank"
    assert recommend_ranks(factors, energy=0.99, max_parameters=50).limit == "budget"
    assert recommend_ranks(factors, max_parameters=50).reached is None


def test_zero_deltas_get_the_lowest_rank():
    factors = {"a": of_spectrum([0.0, 0.0]), "b": of_spectrum([2.0, 1.0])}
    found = recommend_ranks(factors, energy=1.0)
    assert found.ranks == {"a": 1, "b": 2}
    assert found.reached
    nothing = recommend_ranks({"a": of_spectrum([0.0, 0.0])}, max_parameters=1000)
    assert (nothing.ranks, nothing.energy, nothing.uniform_energy) == ({"a": 1}, 1.0, 1.0)


def test_the_uniform_rank_is_interpolated_between_whole_ranks():
    factors = {"a": of_spectrum([2.0, 1.0]), "b": of_spectrum([2.0, 1.0], (4, 4))}
    found = recommend_ranks(factors, max_parameters=30)
    assert found.ranks == {"a": 1, "b": 1}
    assert (found.uniform_rank, found.uniform_energy) == pytest.approx((1.0, 0.8))
    found = recommend_ranks(factors, max_parameters=32)
    assert found.ranks == {"a": 1, "b": 2}
    assert (found.uniform_rank, found.uniform_energy) == pytest.approx((1 + 8 / 24, 0.8 + 0.2 / 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "energy or max_parameters"),
        ({"energy": 0.0}, "energy must be in"),
        ({"energy": 95}, "0.95"),
        ({"energy": math.nan}, "energy must be in"),
        ({"energy": 0.9, "min_rank": 0}, "min_rank must be at least 1"),
        ({"energy": 0.9, "min_rank": 3, "max_rank": 2}, "max_rank must be at least min_rank"),
        ({"max_parameters": 15}, "max_parameters must be at least 16"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recommend_ranks({"a": of_spectrum([1.0])}, **options)


@given(factors=models, extra=st.integers(0, 300))
def test_predicted_errors_are_those_of_the_truncations(factors, extra):
    found = recommend_ranks(factors, max_parameters=lowest_price(factors) + extra)
    for name, layer in factors.items():
        exact = analyze_layer(name, layer, found.ranks[name]).reconstruction_error
        assert found.errors[name] == pytest.approx(exact, abs=1e-9)
    assert found.error**2 == pytest.approx(1 - found.energy, abs=1e-9)


@given(
    factors=layer_factors(),
    share=st.floats(0.01, 0.999) | st.just(1.0),
    most=st.integers(1, 20) | st.none(),
)
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(factors, share, most):
    ranks, short = RankRule(energy=share, max_rank=most).choose({"a": factors})
    rank = ranks["a"]
    assert rank <= min(factors.rank, most or factors.rank)
    if not short:
        assert captured({"a": factors}, ranks) >= share - 3e-6
    if rank and not short:
        assert captured({"a": factors}, {"a": rank - 1}) < share
    if short:
        assert rank == min(factors.rank, most or factors.rank)
        assert captured({"a": factors}, ranks) < share


@given(factors=layer_factors(), error=st.floats(0.01, 0.99), most=st.integers(1, 20) | st.none())
def test_the_rank_for_an_error_is_the_smallest_that_keeps_within_it(factors, error, most):
    ranks, short = RankRule(error=error, max_rank=most).choose({"a": factors})
    rank = ranks["a"]

    def truncation_error(rank: int) -> float:
        return analyze_layer("a", factors, rank).reconstruction_error if rank else 1.0

    if short:
        assert rank == min(factors.rank, most or factors.rank)
        assert truncation_error(rank) > error
    else:
        assert not rank or truncation_error(rank) <= error * (1 + 1e-12)
        assert not rank or truncation_error(rank - 1) > error
    assert rank > 0 or not factors.norm


@given(
    spectrum=st.integers(1, 40).flatmap(spectra),
    held=st.integers(1, 40),
    error=st.floats(1e-3, 0.999),
)
def test_halving_the_ranks_finds_the_one_that_taking_away_triplets_finds(spectrum, held, error):
    norm = torch.tensor(spectrum, dtype=torch.float64).norm().item()
    held_values = spectrum[:held]
    squares = [value * value for value in held_values]
    missing = norm**2 - math.fsum(squares)
    limit = (error * norm) ** 2
    if missing <= 0.01 * limit and missing <= ENERGY_RESOLUTION * norm**2:
        missing = 0.0
    layer = Spectrum(torch.tensor(held_values, dtype=torch.float64), norm, (64, 64))
    rank = smallest_rank(squares, missing, limit)
    found = RankRule(error=error).choose({"a": layer})
    assert found == ({"a": rank}, ["a"] if missing > limit else [])


def test_the_smallest_of_many_ranks_is_found_in_few_sums(monkeypatch):
    summed, fsum = [], math.fsum

    def counting(values):
        values = list(values)
        summed.append(len(values))
        return fsum(values)

    layer = Spectrum(torch.ones(4096, dtype=torch.float64), 64.0, (4096, 4096))
    monkeypatch.setattr(math, "fsum", counting)
    assert RankRule(error=0.99).choose({"a": layer}) == ({"a": 82}, [])
    assert sum(summed) < 20 * 4096


def test_layers_choose_their_ranks_on_their_own_and_zero_deltas_get_none():
    factors = {
        "sharp": of_spectrum([10.0, 0.1, 0.1]),
        "flat": of_spectrum([1.0, 1.0, 1.0, 1.0]),
        "partial": of_spectrum([1.0], norm=2.0),
        "zero": of_spectrum([0.0, 0.0]),
    }
    assert RankRule(energy=0.75).choose(factors) == (
        {"sharp": 1, "flat": 3, "partial": 1, "zero": 0},
        ["partial"],
    )
    assert RankRule(energy=1.0).choose(factors)[0] == {
        "sharp": 3,
        "flat": 4,
        "partial": 1,
        "zero": 0,
    }
    assert RankRule(error=0.5).choose(factors) == RankRule(energy=0.75).choose(factors)
    assert RankRule(error=0.1, max_rank=2).choose(factors) == (
        {"sharp": 1, "flat": 2, "partial": 1, "zero": 0},
        ["flat", "partial"],
    )


@pytest.mark.parametrize("error", [1e-2, 2e-3, 1e-3])
def test_a_small_error_is_kept_to_a_hundredth_of_what_may_be_lost(error):
    # Of 100 equal values 16 make up the error; those that are not held count as lost.
    tail = [error / 4] * 100
    norm = math.hypot(1.0, *tail)
    for held in (100, 95, 90):
        factors = {"a": of_spectrum([1.0, *tail[:held]], (128, 128), norm)}
        for ranks, short in (
            RankRule(error=error).choose(factors),
            RankRule(energy=1 - error**2).choose(factors),
        ):
            lost = 101 - ranks["a"]
            assert not short and lost in (15, 16)


def test_a_spectrum_that_is_no_number_is_refused_by_layer():
    spectra = {"h.0": Spectrum(torch.tensor([math.nan]), 1.0, (2, 2))}
    with pytest.raises(ValueError, match=r"h\.0.*finite"):
        recommend_ranks(spectra, energy=0.5)
    with pytest.raises(ValueError, match=r"h\.0.*finite"):
        RankRule(energy=0.5).choose(spectra)


def test_relative_spectra_are_shares_of_each_layers_own_energy():
    large = Spectrum(torch.tensor([40.0, 30.0]), 100.0, (6, 4))
    zero = Spectrum(torch.zeros(2), 0.0, (4, 4))
    found = relative_spectra({"large": large, "zero": zero})
    torch.testing.assert_close(found["large"].S.square(), torch.tensor([0.16, 0.09]))
    assert (found["large"].norm, found["large"].shape) == (1.0, (6, 4))
    assert found["zero"].norm == 0.0 and not found["zero"].S.any()
    assert recommend_ranks(found, max_parameters=28).energy == pytest.approx(0.25)


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        recommend_ranks({}, energy=0.9)


def recommendation(ranks: dict[str, int]) -> RankRecommendation:
    return RankRecommendation(
        ranks, 1.0, 1, None, None, "held", 1.0, 1.0, dict.fromkeys(ranks, 0.0), 0.0
    )


names = st.from_regex(r"(enc\.|dec\.)?layers?[.X][0-9]{1,2}\.(q|k|q-x|\(q\)|a\|b)", fullmatch=True)


@given(ranks=st.dictionaries(names, st.integers(1, 5), min_size=1, max_size=20))
def test_peft_reads_back_exactly_the_recommended_ranks(ranks):
    found = recommendation(ranks)
    for name, rank in ranks.items():
        for pattern in (found.rank_pattern, found.alpha_pattern):
            key = get_pattern_key(list(pattern), name)
            assert pattern.get(key, found.rank) == rank


def test_the_usual_rank_is_not_counted_for_every_layer(monkeypatch):
    found, counted = recommendation({f"layers.{i}.q": 1 + i % 3 for i in range(50)}), []
    stock = budget.Counter
    monkeypatch.setattr(budget, "Counter", lambda ranks: counted.append(1) or stock(ranks))
    assert len(found.config_options()["rank_pattern"]) == 2
    assert len(counted) < 6


@pytest.mark.parametrize(
    "stranger", ["layers.11.q", "layers.1.q.q", "encoder.layers.1.q", "layersX1.q", "layers.1.qq"]
)
def test_a_pattern_matches_no_other_module(stranger):
    pattern = recommendation({"layers.1.q": 4, "x": 2, "y": 2}).rank_pattern
    assert list(pattern.values()) == [4]
    assert get_pattern_key(list(pattern), stranger) == stranger
    assert get_pattern_key(list(pattern), "layers.1.q") in pattern


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)


@pytest.mark.parametrize(
    "scaled", [{}, {"scaling": 2.5}, {"scaling": 0.3, "use_rslora": True}], ids=str
)
def test_peft_builds_adapters_of_the_recommended_ranks_with_one_scaling(scaled):
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Block() for _ in range(12))})
    ranks = {
        name: 1 + index % 4
        for index, (name, module) in enumerate(model.named_modules())
        if isinstance(module, torch.nn.Linear)
    }
    config = LoraConfig(target_modules=["q", "k"], **recommendation(ranks).config_options(**scaled))
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    for name, rank in ranks.items():
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, LoraLayer)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(scaled.get("scaling", 1.0), rel=1e-12)
