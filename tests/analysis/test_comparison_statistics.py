from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.comparison_runs import COUNTED, SUNK, make_run, whole_experiment

from peft_svdinit.analysis.runs import wording
from peft_svdinit.analysis.runs.compare import compare_runs
from peft_svdinit.analysis.runs.document import comparison_document
from peft_svdinit.analysis.runs.seed_statistics import (
    PairedDifference,
    holm,
    paired_difference,
    spread,
)
from peft_svdinit.analysis.runs.setting_tables import seconds_reached
from peft_svdinit.analysis.runs.summaries import Reached, first_reached
from peft_svdinit.analysis.runs.tables import steps_reached
from peft_svdinit.analysis.runs.trials import Evaluation
from peft_svdinit.analysis.runs.verdicts import headline, verdict
from peft_svdinit.training import Run

LOSSES = st.floats(0.1, 10.0)
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), min_size=3, max_size=8).map(
    lambda pairs: tuple(map(list, zip(*pairs, strict=True)))
)


def row_of(comparison, table, method):
    (found,) = [t for t in comparison.tables if t.name == table]
    (row,) = [r for r in found.rows if r.method == method]
    return row


# Statistics


def test_mean_and_sample_deviation_by_hand():
    result = spread([1.0, 2.0, 4.0])
    assert result is not None and result.mean == pytest.approx(7 / 3)
    assert result.std == pytest.approx(math.sqrt(7 / 3))
    one = spread([1.5])
    assert one is not None and one.std is None
    assert spread([]) is None


@given(PAIRS)
def test_paired_difference_equals_scipy(pair):
    ours, theirs = pair
    result = paired_difference(ours, theirs)
    if result.constant:
        assert result.p is None and result.interval is None
        return
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert result.interval == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@given(PAIRS)
def test_swapping_the_methods_flips_every_sign(pair):
    ours, theirs = pair
    forward, backward = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert forward.mean is not None and backward.mean is not None
    assert forward.mean == -backward.mean and forward.p == backward.p
    if forward.interval is not None and backward.interval is not None:
        assert forward.interval == (-backward.interval[1], -backward.interval[0])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_pairs_are_never_tested(n):
    result = paired_difference([1.0, 1.1][:n], [2.0, 2.2][:n])
    assert result.n == n and result.p is None and result.interval is None
    assert result.outcome == "untested"


def test_equal_differences_are_not_tested_although_they_have_no_spread():
    for gap in (0.0, 0.1):
        result = paired_difference([0.7 + gap, 0.9 + gap, 1.1 + gap], [0.7, 0.9, 1.1])
        assert result.constant and result.p is None and result.outcome == "untested"


def test_paired_difference_refuses_unequal_lengths_and_diverged_losses():
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="leave diverged runs out"):
        paired_difference([1.0, math.nan], [1.0, 2.0])


def test_holm_by_hand():
    # Sorted .01, .02, .04 times 3, 2, 1 gives .03, .04, .04; untested entries do not count.
    assert holm([0.04, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([None]) == [None] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_between_raw_and_bonferroni(p_values):
    adjusted = [p for p in holm(p_values) if p is not None]
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) + 1e-15
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


# Words


@given(PAIRS, st.integers(1, 6))
def test_no_words_of_victory_unless_the_interval_excludes_zero(pair, tests):
    raw = paired_difference(*pair)
    p_holm = None if raw.p is None else min(1.0, raw.p * tests)
    result = PairedDifference(raw.n, raw.mean, raw.std, raw.interval, raw.p, p_holm, tests)
    words = verdict(result)
    if "lower" in words or "higher" in words:
        assert result.interval is not None and result.p_holm is not None
        low, high = result.interval
        assert (high < 0) if "lower" in words else (low > 0)
        assert result.p_holm < 0.05


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (PairedDifference(0, None), "no common seed: not compared"),
        (PairedDifference(1, -0.5), "fewer than 3 seeds: no test"),
        (PairedDifference(2, -0.5, 0.001), "fewer than 3 seeds: no test"),
        (
            PairedDifference(3, -0.5, 0.0, constant=True),
            "the same difference in every seed: no test",
        ),
        (
            PairedDifference(3, -0.1, 0.1, (-0.35, 0.15), 0.2, 0.2, 1),
            "no clear difference (the interval includes 0)",
        ),
        (
            PairedDifference(3, -0.1, 0.1, (-0.2, 0.0), 0.05, 0.04, 1),
            "no clear difference (the interval includes 0)",
        ),
        (
            PairedDifference(3, -0.1, 0.01, (-0.2, -0.01), 0.03, 0.09, 3),
            "no clear difference after correction for 3 methods",
        ),
        (PairedDifference(3, -0.1, 0.01, (-0.2, -0.01), 0.01, 0.02, 2), "lower (better)"),
        (PairedDifference(3, 0.1, 0.01, (0.01, 0.2), 0.01, 0.02, 2), "higher (worse)"),
    ],
)
def test_verdict_says_what_the_test_allows(result, words):
    assert verdict(result) == words


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.898149, 4, "0.8981"),
        (1.8180, 4, "1.818"),
        (1234.0, 4, "1234"),
        (12345.6, 4, "12350"),
        (0.0, 4, "0.000"),
        (-0.0123456, 3, "\u22120.0123"),
        (0.00001234, 2, "1.2e\u221205"),
        (0.049, 2, "0.049"),
        (math.inf, 2, "inf"),
        (None, 4, "n/a"),
    ],
)
def test_numbers_have_sensible_digits(value, digits, text):
    assert wording.significant(value, digits) == text


def test_signs_and_spreads():
    assert wording.signed(0.01234) == "+0.0123" and wording.signed(-0.5) == "\u22120.500"
    assert wording.mean_and_std(spread([1.0])) == "1.000"
    assert wording.mean_and_std(spread([1.0, 2.0])) == "1.500 \u00b1 0.71"


# Where a loss was reached

POINTS = tuple(
    Evaluation(step, loss, 10 * step, 2.0 * step) for step, loss in ((0, 2.0), (10, 1.0), (20, 0.9))
)


@pytest.mark.parametrize(
    ("target", "steps"), [(2.5, 0), (2.0, 0), (1.5, 5), (1.0, 10), (0.95, 15), (0.9, 20)]
)
def test_reaching_a_loss_is_linear_between_evaluations(target, steps):
    reached = first_reached(POINTS, target)
    assert reached is not None
    assert (reached.steps, reached.seconds) == pytest.approx((steps, 2 * steps))


def test_a_loss_below_all_evaluations_is_not_reached():
    assert first_reached(POINTS, 0.89) is None
    assert first_reached((), 1.0) is None


def test_the_first_crossing_counts_and_unknown_seconds_stay_unknown():
    points = [Evaluation(s, v, None, None) for s, v in ((0, 2.0), (10, 1.0), (20, 3.0), (30, 0.5))]
    assert first_reached(points, 1.5) == Reached(5.0, None)


# Comparing runs


def three_seeds(method, ends, **options):
    return [
        make_run(method, seed, (2.0, 1.5, 1.2, end), **options) for seed, end in enumerate(ends)
    ]


RANDOM = three_seeds("random", (1.0, 1.01, 0.99))


def test_methods_are_paired_by_seed_whatever_the_order_of_the_runs():
    runs = RANDOM + three_seeds("svd_delta", (0.90, 0.92, 0.88), teacher=COUNTED)
    row = row_of(compare_runs(runs[::-1]), "equal_steps", "svd_delta")
    assert row.seeds == (0, 1, 2)
    assert row.differences == pytest.approx((-0.10, -0.09, -0.11))
    assert row.result.mean == pytest.approx(-0.10)
    assert row.result.outcome == "lower"


def test_counted_teachers_meet_both_references_and_sunk_ones_have_their_own_table():
    comparison = compare_runs(whole_experiment())
    methods = {table.name: [row.method for row in table.rows] for table in comparison.tables}
    assert methods == {
        "equal_steps": ["svd_delta", "svd_delta_moments", "svd_subspace", "pissa_niter_4"],
        "equal_budget": ["svd_delta", "svd_delta_moments", "svd_subspace"],
        "sunk_teacher": ["svd_given"],
    }
    assert [table.reference for table in comparison.tables] == ["random", "random_total", "random"]
    assert comparison.warnings == ()


def test_holm_spans_the_methods_tested_in_one_table():
    comparison = compare_runs(whole_experiment())
    for table in comparison.tables:
        expected = holm([row.result.p for row in table.rows])
        assert [row.result.p_holm for row in table.rows] == expected
        tested = sum(p is not None for p in expected)
        assert {row.result.tests for row in table.rows} == {tested}


def test_totals_include_the_teacher_unless_its_cost_is_sunk():
    comparison = compare_runs(whole_experiment())
    counted, sunk = comparison.method("svd_delta"), comparison.method("svd_given")
    assert (counted.steps, counted.total_steps) == (60, 100)
    assert (counted.tokens, counted.total_tokens) == (60_000, 100_000)
    assert (counted.seconds, counted.total_seconds) == (120.0, 200.0)
    assert (sunk.total_steps, sunk.teacher_steps, sunk.teacher_sunk) == (60, 500, True)
    assert steps_reached(sunk) == steps_reached(sunk, total=True)


def test_another_method_at_the_total_budget_meets_the_total_reference_only():
    long = {"losses": (2.0, 1.5, 1.2, 1.0, 0.9), "budget": "total"}
    runs = [RANDOM[0], make_run("random_total", **long), make_run("eva_total", **long)]
    comparison = compare_runs(runs)
    assert [table.name for table in comparison.tables] == ["equal_budget"]
    assert row_of(comparison, "equal_budget", "eva_total").result.mean == 0.0
    without = compare_runs([RANDOM[0], make_run("eva_total", **long)])
    assert without.tables == () and "random_total" in without.warnings[0]


def test_steps_and_seconds_to_the_reference_are_within_the_seed():
    # Seed 0 of random ends at 1.0, where the line from 1.2 to 0.9 over 20 steps passes at 53.3.
    runs = RANDOM + three_seeds("svd_delta", (0.90, 1.20, 0.89), teacher=COUNTED)
    method = compare_runs(runs).method("svd_delta")
    reached = method.attempts[0].reached
    assert reached is not None
    assert (reached.steps, reached.seconds) == pytest.approx((160 / 3, 320 / 3))
    assert method.attempts[1].reached is None
    assert steps_reached(method) == "53 (2 of 3 seeds)"
    assert steps_reached(method, total=True) == "93 (2 of 3 seeds)"
    assert seconds_reached(method, total=True) == "187 (2 of 3 seeds)"


def test_a_loss_never_reached_is_said_to_be_so():
    runs = RANDOM + three_seeds("eva", (1.1, 1.1, 1.1))
    assert steps_reached(compare_runs(runs).method("eva")) == "not reached"


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="got 'random'; the runs hold eva"):
        compare_runs([make_run("eva")])
    with pytest.raises(ValueError, match="got 'nothing'; the runs hold random"):
        compare_runs(RANDOM, total_reference="nothing")
    with pytest.raises(ValueError, match="got none"):
        compare_runs([])
    with pytest.raises(ValueError, match="sweep runs only"):
        compare_runs([make_run("random", sweep=True)])


def test_an_unfinished_run_is_refused():
    with pytest.raises(ValueError, match=r"status must be 'completed', got 'running'; resume"):
        compare_runs([*RANDOM, make_run("eva", status="running")])


def test_a_run_without_evaluations_is_refused():
    run = make_run("random")
    for row in run.log:
        row["eval_loss"] = None
    with pytest.raises(ValueError, match="no eval_loss"):
        compare_runs([run])


def test_contradicting_runs_of_one_method_are_refused():
    with pytest.raises(ValueError, match="several for seed 0"):
        compare_runs([*RANDOM, make_run("random", 0, (2.0, 1.0))])
    with pytest.raises(ValueError, match="same label"):
        compare_runs([*RANDOM, make_run("random", 7, label="another")])
    with pytest.raises(ValueError, match="same teacher"):
        compare_runs(
            [*RANDOM, make_run("svd", 0, teacher=COUNTED), make_run("svd", 1, teacher=SUNK)]
        )


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"kind": "full", "sunk": False}, "seconds, steps, tokens missing"),
        ({**COUNTED, "kind": "imagined"}, "teacher.kind must be one of"),
        ({**COUNTED, "steps": None}, "must state its steps"),
    ],
)
def test_an_incomplete_teacher_is_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        compare_runs([*RANDOM, make_run("svd", teacher=teacher)])


def test_a_sunk_teacher_may_have_an_unknown_cost():
    teacher = {"kind": "given", "steps": None, "tokens": None, "seconds": None, "sunk": True}
    method = compare_runs([*RANDOM, make_run("svd", teacher=teacher)]).method("svd")
    assert method.teacher_steps is None and method.total_steps == method.steps


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="budget must be one of student, total"):
        compare_runs([make_run("random", budget="half")])


def test_runs_without_a_description_are_methods_by_their_names():
    runs = [make_run("a", extra={}, name="mine"), make_run("b", extra={}, name="theirs")]
    comparison = compare_runs(runs, reference="theirs")
    assert [method.method for method in comparison.methods] == ["theirs", "mine"]
    assert row_of(comparison, "equal_steps", "mine").result.mean == 0.0
    assert comparison.tables[0].reference == "theirs"


def test_only_common_seeds_are_paired_and_the_rest_is_said():
    runs = RANDOM + three_seeds("eva", (0.9, 0.9))
    comparison = compare_runs(runs)
    row = row_of(comparison, "equal_steps", "eva")
    assert row.seeds == (0, 1) and row.result.p is None
    assert any("only the common ones (0, 1)" in warning for warning in comparison.warnings)
    alone = compare_runs([*RANDOM, make_run("eva", 9)])
    assert row_of(alone, "equal_steps", "eva").result.n == 0
    assert any("none is paired" in warning for warning in alone.warnings)


@pytest.mark.parametrize("where", ["loss", "eval_loss"])
def test_a_diverged_run_is_named_and_counted_but_in_no_mean(where):
    runs = RANDOM + three_seeds("eva", (0.9, 0.91, 0.92))
    run = make_run("eva", 3, (2.0, 1.5, 1.2, 0.1))
    next(row for row in run.log if row.get(where) is not None and row["step"])[where] = math.nan
    comparison = compare_runs([*runs, make_run("random", 3), run])
    eva = comparison.method("eva")
    assert eva.seeds == (0, 1, 2, 3) and eva.diverged_seeds == (3,)
    assert eva.final is not None and eva.final.n == 3
    assert eva.final.mean == pytest.approx(0.91)
    assert row_of(comparison, "equal_steps", "eva").seeds == (0, 1, 2)
    assert any(
        f"The run {run.info['name']} (eva, seed 3) diverged" in w for w in comparison.warnings
    )


def test_a_diverged_reference_leaves_nothing_to_pair():
    comparison = compare_runs([make_run("random", losses=(2.0, math.inf)), make_run("eva")])
    assert row_of(comparison, "equal_steps", "eva").result.outcome == "untested"
    assert steps_reached(comparison.method("eva")) == "n/a"
    assert "No common seeds" in headline(comparison)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "world sizes"),
        ({"trainable_parameters": 5}, "trainable parameters"),
        ({"total_parameters": 90_000}, "different models"),
        ({"data_seed": 5}, "different data seeds"),
        ({"versions": {"torch": "2.12"}}, "different versions of torch"),
        ({"hardware": {"cpu_cores": 8, "device": "cpu"}}, "different machines"),
        ({"steps": 61}, "last evaluation is of step 60 of 61"),
        ({"tokens": 70_000}, "own tokens at seed 0: 70,000 and 60,000"),
    ],
)
def test_unequal_settings_are_warned_of(change, message):
    comparison = compare_runs([make_run("random"), make_run("eva", **change)])
    assert any(message in warning for warning in comparison.warnings), comparison.warnings


def test_different_models_by_name_are_warned_of():
    runs = [make_run("random"), make_run("eva")]
    for run, model in zip(runs, ("one", "other"), strict=True):
        run.info["extra"]["model"] = model
    assert "The runs are of different models: one, other." in compare_runs(runs).warnings


def test_different_evaluation_steps_are_warned_of_unless_they_only_end_later():
    coarse = make_run("eva", losses=(2.0, 1.5, 1.0), every=30)
    assert any(
        "not evaluated at the same steps" in w for w in compare_runs([RANDOM[0], coarse]).warnings
    )
    total = make_run("random_total", losses=(2.0, 1.5, 1.2, 1.0, 0.9, 0.8), budget="total")
    svd = make_run("svd", teacher=COUNTED)
    assert compare_runs([RANDOM[0], total, svd]).warnings == ()


def test_unequal_budgets_are_warned_of():
    short = make_run("eva", losses=(2.0, 1.5, 1.2))
    assert any(
        "own steps at seed 0: 40 and 60" in w for w in compare_runs([RANDOM[0], short]).warnings
    )
    svd = make_run("svd", teacher=COUNTED)
    assert any("no run 'random_total'" in w for w in compare_runs([RANDOM[0], svd]).warnings)
    total = make_run("random_total", losses=(2.0, 1.5, 1.2, 1.0, 0.9), budget="total")
    warnings = compare_runs([RANDOM[0], svd, total]).warnings
    assert any("total steps at seed 0: 100 and 80" in warning for warning in warnings)


# The sweep


def sweep_run(method, rate, end, seed=0):
    return make_run(method, seed, (2.0, 1.5, end), learning_rate=rate, sweep=True)


def test_sweep_runs_are_in_their_table_only():
    runs = [*RANDOM, *(sweep_run("random", rate, end) for rate, end in ((2e-3, 1.3), (1e-3, 1.2)))]
    comparison = compare_runs(runs)
    (sweep,) = comparison.sweeps
    assert comparison.method("random").seeds == (0, 1, 2)
    assert [point.learning_rate for point in sweep.points] == [1e-3, 2e-3]
    assert sweep.chosen == sweep.lowest == 1e-3
    assert sweep.lowest_at_edge
    assert [(point.chosen, point.lowest) for point in sweep.points] == [
        (True, True),
        (False, False),
    ]


def test_a_rate_at_which_a_run_diverged_is_never_the_lowest():
    runs = [*RANDOM, sweep_run("random", 1e-3, 1.2), sweep_run("random", 2e-3, 1.0)]
    runs.append(sweep_run("random", 2e-3, math.nan, seed=1))
    (sweep,) = compare_runs(runs).sweeps
    assert sweep.lowest == 1e-3 and sweep.points[1].diverged_seeds == (1,)


def test_the_compared_runs_stand_in_for_their_own_rate():
    other = make_run("random", 0, (2.0, 1.5, 1.2, 1.1), learning_rate=2e-3, sweep=True)
    (sweep,) = compare_runs([*RANDOM, other]).sweeps
    assert [(point.learning_rate, point.seeds) for point in sweep.points] == [
        (1e-3, (0,)),
        (2e-3, (0,)),
    ]


def test_a_sweep_of_unequal_lengths_or_without_rates_is_refused():
    with pytest.raises(ValueError, match="same length, got 20, 40 steps"):
        compare_runs(
            [
                *RANDOM,
                sweep_run("random", 1e-3, 1.0),
                make_run("random", losses=(2.0, 1.0), learning_rate=2e-3, sweep=True),
            ]
        )
    run = sweep_run("random", 1e-3, 1.0)
    run.info["extra"]["comparison"]["learning_rate"] = None
    with pytest.raises(ValueError, match="must state learning_rate"):
        compare_runs([*RANDOM, run])


# The headline


def test_the_headline_counts_the_teacher_first_and_claims_only_what_was_tested():
    text = headline(compare_runs(whole_experiment()))
    assert text == (
        "With the teacher\u2019s cost counted, no start ended clearly at a lower loss than "
        "\u201crandom, total budget\u201d."
    )
    one = headline(compare_runs(whole_experiment((0,))))
    assert one.startswith("One seed is too few") and "lower" not in one
    assert "nothing to compare" in headline(compare_runs(RANDOM))


def test_the_headline_names_a_tested_winner():
    runs = RANDOM + three_seeds("svd", (0.90, 0.92, 0.88), label="SVD")
    assert headline(compare_runs(runs)) == (
        "At equal student steps, SVD ended at a lower loss than random."
    )


def test_of_several_evaluation_sets_one_is_compared():
    def of_two_sets(method: str, seed: int, losses: tuple[float, ...]) -> Run:
        run = make_run(method, seed, losses)
        log = [
            {
                "eval_math_loss" if name == "eval_loss" else name: value
                for name, value in row.items()
            }
            for row in run.log
        ]
        code = [{"step": row["step"], "eval_code_loss": 9.0} for row in log]
        return replace(run, log=[*log, *code])

    runs = [of_two_sets("random", 0, (2.0, 1.5)), of_two_sets("eva", 0, (2.0, 1.0))]
    with pytest.raises(ValueError, match=r"no eval_loss .* of eval_code_loss, eval_math_loss$"):
        compare_runs(runs)
    with pytest.raises(ValueError, match=r"metric must be an evaluation loss, .* 'eval_accuracy'"):
        compare_runs(runs, metric="eval_accuracy")
    comparison = compare_runs(runs, metric="eval_math_loss")
    assert [trial.evaluations[-1].loss for trial in comparison.trials] == [1.5, 1.0]
    document = comparison_document(comparison, {}, ())
    assert document.subtitle.endswith("eval_math_loss")
