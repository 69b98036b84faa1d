"""Numbers and verdicts in words; the only place that may call one method better than another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compare import Comparison, MethodSummary, PairedRow, PairedTable
from .seed_statistics import FEWEST_SEEDS_FOR_A_TEST, PairedDifference, Spread

NOT_KNOWN = "n/a"
TOO_FEW_SEEDS = f"fewer than {FEWEST_SEEDS_FOR_A_TEST} seeds: no test"


def significant(value: float | None, digits: int) -> str:
    """`value` rounded to `digits` significant digits, with a true minus sign."""
    if value is None:
        return NOT_KNOWN
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-4 <= abs(value) < 10**6:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:#.{digits}g}"
        text = f"{float(text):.0f}" if "e" in text else text.rstrip(".")
    return text.replace("-", "\u2212")


def loss(value: float | None) -> str:
    return significant(value, 4)


def signed(value: float | None) -> str:
    """A difference with its sign, to three significant digits."""
    text = significant(value, 3)
    return f"+{text}" if value is not None and value > 0 else text


def p_value(value: float | None) -> str:
    return significant(value, 2)


def mean_and_std(spread: Spread | None) -> str:
    """`0.8981 ± 0.012`; a single seed has no spread to state."""
    if spread is None:
        return NOT_KNOWN
    deviation = f"\u00b1 {significant(spread.std, 2)}" if spread.std is not None else "(spread n/a)"
    return f"{loss(spread.mean)} {deviation}"


def count(value: float | None) -> str:
    """A number of steps or tokens; a mean over seeds is rounded to a whole one."""
    return NOT_KNOWN if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    return significant(value, 3) if value < 1000 else f"{value:,.0f}"


def rate(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:g}"


def share(value: float, decimals: int = 0) -> str:
    return f"{100 * value:.{decimals}f}\u00a0%"


def named(label: str) -> str:
    """A label inside a sentence; quoted where its own commas would read as the sentence's."""
    return f"\u201c{label}\u201d" if "," in label or ";" in label else label


def interval(result: PairedDifference) -> str:
    if result.interval is None:
        return NOT_KNOWN
    low, high = result.interval
    return f"{signed(low)} to {signed(high)}"


def steps_reached(summary: MethodSummary, *, total: bool = False) -> str:
    """Mean steps until the reference's final loss over the seeds that reached it, and how many."""
    extra = summary.total_steps - summary.steps if total else 0.0
    return _reached(
        summary, [a.reached.steps for a in summary.comparable if a.reached], extra, count
    )


def seconds_reached(summary: MethodSummary, *, total: bool = False) -> str:
    """As `steps_reached`, in seconds of training."""
    values = [a.reached.seconds for a in summary.comparable if a.reached]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return NOT_KNOWN
    extra = 0.0 if not total or summary.teacher_sunk else summary.teacher_seconds or 0.0
    return _reached(summary, known, extra, seconds)


def _reached(summary: MethodSummary, values: Sequence[float], extra: float, written) -> str:
    possible = len(summary.comparable)
    if not possible:
        return NOT_KNOWN
    if not values:
        return "not reached"
    text = written(sum(values) / len(values) + extra)
    return text if len(values) == possible else f"{text} ({len(values)} of {possible} seeds)"


def verdict(result: PairedDifference) -> str:
    """What a paired difference of losses allows to be said, without the methods' names.

    "Lower" and "higher" appear only for a 95 % interval that excludes 0 and a corrected p below
    0.05; a difference without a test is a number and no more.
    """
    if result.mean is None:
        return "no common seed: not compared"
    if result.constant:
        return "the same difference in every seed: no test"
    if result.outcome == "untested":
        return TOO_FEW_SEEDS
    if result.outcome == "unclear":
        low, high = result.interval or (0.0, 0.0)
        if low <= 0 <= high:
            return "no clear difference (the interval includes 0)"
        return f"no clear difference after correction for {result.tests} methods"
    return "lower (better)" if result.outcome == "lower" else "higher (worse)"


def headline(comparison: Comparison) -> str:
    """The answer in a sentence, from the fairest table there is: cost counted before cost sunk."""
    by_name = {table.name: table for table in comparison.tables}
    for name in ("equal_budget", "sunk_teacher", "equal_steps"):
        if name in by_name:
            return _answer(by_name[name])
    return "Only the reference was trained: there is nothing to compare."


def _answer(table: PairedTable) -> str:
    under = {
        "equal_budget": "With the teacher\u2019s cost counted",
        "sunk_teacher": "With a teacher that existed already",
        "equal_steps": "At equal student steps",
    }[table.name]
    reference = named(table.reference_label)
    tested = [row for row in table.rows if row.result.outcome != "untested"]
    better = [named(row.label) for row in tested if row.result.outcome == "lower"]
    if better:
        return f"{under}, {_and(better)} ended at a lower loss than {reference}."
    if tested:
        worse = [named(row.label) for row in tested if row.result.outcome == "higher"]
        and_worse = f", and {_and(worse)} at a higher one" if worse else ""
        return f"{under}, no start ended clearly at a lower loss than {reference}{and_worse}."
    most = max(row.result.n for row in table.rows)
    if most >= FEWEST_SEEDS_FOR_A_TEST:
        return f"{under}, no start could be tested against {reference}."
    return (
        f"{_seeds(most)} {'is' if most == 1 else 'are'} too few to say whether a start beats "
        f"{reference}: what follows is an observation, not a test."
    )


def table_sentence(table: PairedTable) -> str:
    """All verdicts of one table, to follow a colon: labels keep their case."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "unclear": [], "untested": []}
    for row in table.rows:
        groups[row.result.outcome].append(_with_difference(row))
    reference = named(table.reference_label)
    parts = []
    if groups["lower"]:
        parts.append(f"{_and(groups['lower'])} ended lower than {reference}")
    if groups["higher"]:
        parts.append(f"{_and(groups['higher'])} ended higher than {reference}")
    if groups["unclear"]:
        other = "" if parts else f" from {reference}"
        parts.append(f"no clear difference{other}: {_and(groups['unclear'])}")
    if groups["untested"]:
        parts.append(f"not tested against {reference}: {_and(groups['untested'])}")
    return "; ".join(parts) + "."


def _with_difference(row: PairedRow) -> str:
    return f"{named(row.label)} ({signed(row.result.mean)})"


def _seeds(number: int) -> str:
    if number == 0:
        return "No common seeds"
    return "One seed" if number == 1 else f"{number} seeds"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
