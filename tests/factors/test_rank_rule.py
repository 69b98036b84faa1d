"""What a user says about ranks against the ranks that follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_svdinit.factors import RankRule, Spectrum

SPECTRA = {
    "steep": Spectrum(torch.tensor([4.0, 2.0, 1.0]), 21.0**0.5, (6, 5)),
    "flat": Spectrum(torch.tensor([2.0, 2.0, 2.0]), 4.0, (40, 3)),  # a fourth 2 is not held
    "zero": Spectrum(torch.tensor([0.0]), 0.0, (6, 5)),
}


def test_a_rank_is_that_of_all_layers_but_small_and_unchanged_ones():
    ranks, short = RankRule(rank=4).choose(SPECTRA)
    assert ranks == {"steep": 4, "flat": 3, "zero": 0}
    assert short == []


def test_an_energy_is_met_layer_by_layer_and_who_falls_short_is_named():
    ranks, short = RankRule(energy=0.9, max_rank=3).choose(SPECTRA)
    assert ranks == {"steep": 2, "flat": 3, "zero": 0}
    assert short == ["flat"]


def test_an_error_says_the_same_in_another_word():
    by_error = RankRule(error=0.1**0.5, max_rank=3).choose(SPECTRA)
    assert by_error == RankRule(energy=0.9, max_rank=3).choose(SPECTRA)


@given(budget=st.integers(54, 400))
def test_a_budget_is_kept_and_spent_on_the_largest_values(budget):
    ranks, _ = RankRule(max_parameters=budget, max_rank=3).choose(SPECTRA)
    spent = sum(rank * sum(SPECTRA[name].shape) for name, rank in ranks.items())
    assert spent <= budget
    assert ranks["zero"] == 0
    # A triplet of the steep layer costs a quarter of one of the flat one.
    assert ranks["flat"] == 1 or ranks["steep"] >= 2


@given(budget=st.integers(65, 400))
def test_a_budget_for_one_rank_of_all_pays_for_the_padding_too(budget):
    ranks, _ = RankRule(max_parameters=budget, max_rank=4, uniform=True).choose(SPECTRA)
    padded = max(ranks.values()) * sum(sum(layer.shape) for layer in SPECTRA.values())
    assert padded <= budget
    with pytest.raises(ValueError, match="max_parameters must be at least 65 to give all 3"):
        RankRule(max_parameters=64, uniform=True).choose(SPECTRA)


def test_where_no_layer_can_be_left_out_a_zero_delta_has_rank_1_and_costs_it():
    for rule in (RankRule(energy=0.9), RankRule(error=0.3), RankRule(max_parameters=65)):
        assert rule.choose(SPECTRA, least=1)[0]["zero"] == 1
    with pytest.raises(ValueError, match="at least 65 "):
        RankRule(max_parameters=64).choose(SPECTRA, least=1)
    assert RankRule(max_parameters=64).choose(SPECTRA)[0]["zero"] == 0


def test_the_bound_of_a_rule_is_its_rank_or_what_is_said():
    assert RankRule(rank=7).most == 7
    assert RankRule(energy=0.5, max_rank=9).most == 9
    assert RankRule(energy=0.5).most is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank, energy, error and max_parameters, got rank=None"),
        ({"rank": 4, "energy": 0.5}, r"exactly one of .*, got rank=4, energy=0.5"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"max_parameters": -1}, "max_parameters must be at least 1"),
        ({"rank": 4, "max_rank": 8}, "max_rank bounds the ranks of other rules"),
        ({"energy": 95, "max_rank": 8}, "write 95 % as 0.95"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0"),
        ({"error": float("nan")}, "error must be in"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank must be at least 1, got 0"),
        ({"error": 1.0, "max_rank": 8}, "write 5 % as 0.05"),
        ({"error": 1e-4, "max_rank": 8}, "tell no smaller one from rounding"),
        ({"energy": 1 - 1e-8, "max_rank": 8}, "tell no larger one from rounding"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RankRule(**options)
