"""The metrics for `evaluate`: against slow references, offline, and what they refuse."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import evaluate
import evaluate.config
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metrics.exact_match.exact_match import final_number, wilson_interval
from metrics.forgetting.forgetting import increase
from metrics.perplexity.perplexity import mean_loss
from scipy.stats import binomtest, t

METRICS = Path(__file__).resolve().parents[2] / "recipes" / "metrics"
losses = st.floats(0, 50)
examples = st.lists(st.tuples(losses, losses, st.integers(1, 40)), min_size=2, max_size=12)


@pytest.fixture(autouse=True)
def _offline_in_a_private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def load(name: str, config: str | None = None) -> Any:
    return evaluate.load(str(METRICS / name), config)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12", 12),
        ("The answer is: $1,000.00.", 1000),
        ("2 + 3 = 5 #### -7", -7),
        ("#### 3 The answer is 4. Then 5 more", 4),
        ("10 - 5 = 5, and 3-2", 2),
        ("\u22122.5 degrees", -2.5),
        ("the answer is 3/4", 0.75),
        ("half is .5", 0.5),
        ("it was 5 %", 5),
        ("1,2", 2),
        ("7 = 7. The answer is seven", None),
        ("none", None),
        ("", None),
        ("The answer is 5/0", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**9), 10**9), st.text("abc .:", max_size=9), st.text(" .abc", max_size=9))
def test_every_way_to_write_a_number_is_the_same_number(number, before, after):
    for written in (str(number), f"{number:,}", f"{number}.0", f"{number:,}.00"):
        assert final_number(f"1 + 1 = 2. {before}The answer is {written}{after}") == number
        assert final_number(f"1 + 1 = 2. {written} {after.replace('.', '')}") == number


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_wilsons(case):
    right, count = case
    reference = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((reference.low, reference.high), abs=1e-9)


def ratio_by_hand(sums: list[float], tokens: list[int]) -> tuple[float, float]:
    """A ratio of sums and its standard error, as the textbook writes them."""
    ratio = sum(sums) / sum(tokens)
    mean_length = sum(tokens) / len(tokens)
    spread = sum((one - ratio * count) ** 2 for one, count in zip(sums, tokens, strict=True))
    return ratio, math.sqrt(spread / (len(sums) - 1) / len(sums)) / mean_length


@given(examples)
def test_losses_and_increases_are_ratios_over_examples(cases):
    before, after, tokens = map(list, zip(*cases, strict=True))
    differences = [late - early for early, late in zip(before, after, strict=True)]
    for found, sums in (
        (mean_loss(after, tokens), after),
        (increase(before, after, tokens), differences),
    ):
        ratio, error = ratio_by_hand(sums, tokens)
        figure, interval = found
        assert figure == pytest.approx(ratio, abs=1e-9)
        reach = t.ppf(0.975, len(tokens) - 1) * error
        assert interval == pytest.approx((ratio - reach, ratio + reach), abs=1e-6)


def test_examples_of_no_tokens_do_not_count():
    before, after, tokens = [1.0, 2.0, 4.0], [2.0, 3.0, 3.0], [1, 2, 3]
    for name, sums in (
        ("perplexity", {"nll": after}),
        ("forgetting", {"before": before, "after": after}),
    ):
        more = {key: [0.0, *values, 0.0] for key, values in sums.items()}
        found = load(name).compute(**more, tokens=[0, *tokens, 0])
        assert found == load(name).compute(**sums, tokens=tokens)
        more[next(reversed(more))][-1] = 0.5
        with pytest.raises(ValueError, match=r"of no tokens must be 0, .* 4 is 0\.5"):
            load(name).compute(**more, tokens=[0, *tokens, 0])


def test_the_interval_holds_the_truth_in_19_of_20_draws():
    generator = random.Random(0)
    held = 0
    for _ in range(2000):
        tokens = [generator.randint(1, 30) for _ in range(8)]
        sums = [count * (2 + generator.gauss(0, 0.5)) for count in tokens]
        interval = mean_loss(sums, tokens)[1]
        assert interval
        held += interval[0] <= 2 <= interval[1]
    assert 0.90 < held / 2000 < 0.97


def test_batches_and_combinations_give_what_one_call_gives(monkeypatch):
    monkeypatch.chdir(METRICS.parents[1])
    exact, perplexity = load("exact_match", "numeric"), evaluate.load("recipes/metrics/perplexity")
    combined = evaluate.combine([exact, perplexity, str(METRICS / "forgetting")])
    texts = [("The answer is 4", "#### 4"), ("5", "6"), ("", "7")]
    numbers = [(1.0, 2.0, 3), (0.5, 0.25, 1), (4.0, 5.0, 2)]
    for (said, wanted), (before, after, tokens) in zip(texts, numbers, strict=True):
        combined.add_batch(
            predictions=[said], references=[wanted],
            nll=[after], before=[before], after=[after], tokens=[tokens],
        )  # fmt: skip
    found = combined.compute()
    before, after, tokens = map(list, zip(*numbers, strict=True))
    said, wanted = map(list, zip(*texts, strict=True))
    alone = {
        **load("exact_match").compute(predictions=said, references=wanted, answers="numeric"),
        **load("perplexity").compute(nll=after, tokens=tokens),
        **load("forgetting").compute(before=before, after=after, tokens=tokens),
    }
    assert found["exact_match"] == 1 / 3
    assert found["perplexity"] == math.exp(7.25 / 6)
    assert found["forgetting"] == pytest.approx(1.75 / 6)
    for name in set(alone) - {"examples", "tokens"}:
        assert found[name] == alone[name]
    assert found["exact_match_examples"] == alone["examples"] == 3
    assert load("exact_match").compute(predictions=[" a"], references=["a "])["exact_match"] == 1


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("exact_match", {"predictions": ["1"], "references": ["1", "2"]}, "Mismatch in the number"),
        ("exact_match", {"predictions": [], "references": []}, "predictions must not be empty"),
        (
            "exact_match",
            {"predictions": ["1"], "references": ["a"], "answers": "numeric"},
            "number 0 has none: 'a'",
        ),
        (
            "exact_match",
            {"predictions": ["1"], "references": ["a"], "answers": "number"},
            "answers must be .* got 'number'",
        ),
        ("perplexity", {"nll": [1.0], "tokens": [1, 2]}, "Mismatch in the number"),
        ("perplexity", {"nll": [], "tokens": []}, "nll must not be empty"),
        ("perplexity", {"nll": [1.0, math.nan], "tokens": [1, 2]}, "nll must be finite, number 1"),
        ("perplexity", {"nll": [1.0, 1.0], "tokens": [1, -2]}, "tokens must be .* least is -2"),
        ("perplexity", {"nll": [0.0], "tokens": [0]}, "tokens must be at least 0"),
        ("forgetting", {"before": [1.0], "after": [], "tokens": [1]}, "Mismatch in the number"),
        ("forgetting", {"before": [], "after": [], "tokens": []}, "before must hold the loss"),
        (
            "forgetting",
            {"before": [1.0], "after": [math.inf], "tokens": [1]},
            "after must be finite, example 0 is inf",
        ),
        ("forgetting", {"before": [1.0], "after": [1.0], "tokens": [-1]}, "tokens must be at lea"),
    ],
)
def test_a_wrong_input_is_refused(name, inputs, expected):
    with pytest.raises(ValueError, match=expected):
        load(name).compute(**inputs)
