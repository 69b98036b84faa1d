"""What a test allows to be said: the only place that may call one method better than another."""

from __future__ import annotations

from . import wording
from .compare import Comparison
from .paired_tables import PairedTable
from .seed_statistics import FEWEST_SEEDS_FOR_A_TEST, PairedDifference

UNDER = {
    "equal_budget": "With the teacher\u2019s cost counted",
    "sunk_teacher": "With a teacher that existed already",
    "equal_steps": "At equal student steps",
}


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
        return f"fewer than {FEWEST_SEEDS_FOR_A_TEST} seeds: no test"
    if result.outcome == "unclear":
        low, high = result.interval or (0.0, 0.0)
        if low <= 0 <= high:
            return "no clear difference (the interval includes 0)"
        return f"no clear difference after correction for {result.tests} methods"
    return "lower (better)" if result.outcome == "lower" else "higher (worse)"


def headline(comparison: Comparison) -> str:
    """The answer in a sentence, from the fairest table there is: cost counted before cost sunk."""
    tables = {table.name: table for table in comparison.tables}
    for name, under in UNDER.items():
        if name in tables:
            return _answer(tables[name], under)
    return "Only the reference was trained: there is nothing to compare."


def _answer(table: PairedTable, under: str) -> str:
    reference = wording.named(table.reference_label)
    better, worse = _ended(table, "lower"), _ended(table, "higher")
    if better:
        return f"{under}, {better} ended at a lower loss than {reference}."
    if any(row.result.outcome != "untested" for row in table.rows):
        and_worse = f", and {worse} at a higher one" if worse else ""
        return f"{under}, no start ended clearly at a lower loss than {reference}{and_worse}."
    most = max(row.result.n for row in table.rows)
    if most >= FEWEST_SEEDS_FOR_A_TEST:
        return f"{under}, no start could be tested against {reference}."
    return (
        f"{wording.seeds(most)} {'is' if most == 1 else 'are'} too few to say whether a start "
        f"beats {reference}: what follows is an observation, not a test."
    )


def _ended(table: PairedTable, outcome: str) -> str:
    names = [wording.named(row.label) for row in table.rows if row.result.outcome == outcome]
    return " and ".join(filter(None, [wording.listed(names[:-1]), *names[-1:]]))
