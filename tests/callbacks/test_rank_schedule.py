"""When a switch is due, as questions to what was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_callbacks.rank_schedule import (
    AtEpoch,
    AtStep,
    LossPlateau,
    Seen,
    StableRankPlateau,
    When,
    described,
    rewarmup,
)


def losses(*values: float, metric: str = "loss") -> Seen:
    return Seen(len(values), 0.0, [{metric: value} for value in values])


def ranks(*epochs: list[float]) -> Seen:
    return Seen(0, 0.0, stable_ranks=[{f"layer{i}": v for i, v in enumerate(e)} for e in epochs])


@given(step=st.integers(0, 50), seen=st.integers(0, 60))
def test_a_step_is_due_from_it_on(step, seen):
    assert AtStep(step).due(Seen(seen, 0.0)) == (seen >= step)


def test_an_epoch_is_due_when_its_fractions_add_up():
    assert AtEpoch(10).due(Seen(0, sum([0.1] * 100)))
    assert not AtEpoch(10).due(Seen(0, 9.99))
    assert AtEpoch(0).due(Seen(0, 0.0))


def test_a_plateau_is_as_many_values_without_improvement():
    trigger = LossPlateau(patience=3, min_delta=0.01)
    assert not trigger.due(losses(5, 4, 3, 3, 3))  # Nothing before the last three was better.
    assert trigger.due(losses(5, 4, 3, 3, 3, 3))
    assert trigger.due(losses(5, 3, 2.98, 3.1, 2.99))  # Better by less than a hundredth.
    assert not trigger.due(losses(5, 3, 2.96, 3.1, 3.2))
    assert not trigger.due(losses(3, 3, 3))
    assert not trigger.due(losses())


def test_a_plateau_of_negative_losses_needs_an_improvement_too():
    assert not LossPlateau(1, 0.1).due(losses(-1.0, -1.2))
    assert LossPlateau(1, 0.1).due(losses(-1.0, -1.05))


def test_a_plateau_is_of_the_metric_asked_for():
    seen = losses(3, 3, 3, metric="eval_loss")
    assert LossPlateau(2, metric="eval_loss").due(seen)
    assert not LossPlateau(2).due(seen)


def test_stable_ranks_settle_when_all_layers_have():
    trigger = StableRankPlateau(window=2, tolerance=0.1)
    assert not trigger.due(ranks([5, 5], [5, 5]))
    assert trigger.due(ranks([9, 9], [5, 5], [5.1, 5], [5, 5.1]))
    assert not trigger.due(ranks([5, 5], [5, 6], [5, 7]))
    assert StableRankPlateau(2, 0.1, share=0.5).due(ranks([5, 5], [5, 6], [5, 7]))
    assert not StableRankPlateau(2, 0.1).due(ranks([50], [50.5], [51]))
    assert StableRankPlateau(2, 0.1, relative=True).due(ranks([50], [50.5], [51]))


def test_a_function_is_asked_with_all_that_was_seen():
    assert When(lambda seen: seen.logs[-1]["loss"] < 2).due(losses(3, 1))


def test_a_trigger_is_described_without_code():
    assert described(AtStep(3)) == {"kind": "AtStep", "step": 3}
    assert described(When(lambda seen: True)) == {"kind": "When"}


def test_a_warm_up_rises_evenly_to_one():
    shares = [rewarmup(step, 3) for step in range(5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rewarmup(0, 0) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AtStep(-1), "step must not be negative, got -1"),
        (lambda: AtEpoch(-0.5), "lowrank_switch_epoch must not be negative"),
        (lambda: LossPlateau(patience=0), "patience must be at least 1"),
        (lambda: LossPlateau(min_delta=float("nan")), "min_delta not negative"),
        (lambda: StableRankPlateau(share=0), "share in"),
    ],
)
def test_a_trigger_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
