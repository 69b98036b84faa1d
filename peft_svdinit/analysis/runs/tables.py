"""The tables of a comparison as text, so that the report and the page print the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import wording
from .compare import Attempt, Comparison, MethodSummary, PairedTable
from .sweeps import Sweep

TABLE_TITLES = {
    "equal_steps": "Equal student steps",
    "equal_budget": "Equal total budget",
    "sunk_teacher": "A teacher that exists already",
}


@dataclass(frozen=True)
class TextTable:
    """Cells as plain text, neither escaped nor marked up; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    last_is_text: bool = False


def results_table(comparison: Comparison) -> TextTable:
    """The main table: what each method reached, after how much training."""
    reference = comparison.method(comparison.reference).label
    return TextTable(
        "Results",
        (
            "method",
            "final eval loss",
            "eval loss at step 0",
            "steps",
            "total steps",
            f"steps to {reference}\u2019s final loss",
            "the same, with the teacher\u2019s",
            "learning rate",
            "seeds",
        ),
        tuple(
            (
                method.label,
                wording.mean_and_std(method.final),
                wording.loss(method.step0.mean if method.step0 else None),
                wording.count(method.steps),
                wording.count(method.total_steps),
                wording.steps_reached(method),
                wording.steps_reached(method, total=True),
                wording.rate(method.learning_rate),
                _seeds(method),
            )
            for method in comparison.methods
        ),
        "Final eval loss: mean \u00b1 sample standard deviation over seeds, lower is better. The "
        "loss at step 0 is that of the start alone, before the student trains. Total steps include "
        "the teacher\u2019s unless its cost is sunk. Steps to the reference\u2019s final loss are "
        "counted within one seed, linear between evaluations.",
    )


def cost_table(comparison: Comparison) -> TextTable:
    """Tokens and seconds, the student's own and with the teacher's."""
    reference = comparison.method(comparison.reference).label
    return TextTable(
        "Cost",
        (
            "method",
            "teacher",
            "teacher counted",
            "tokens",
            "total tokens",
            "training seconds",
            "total seconds",
            f"seconds to {reference}\u2019s final loss",
            "the same, with the teacher\u2019s",
        ),
        tuple(
            (
                method.label,
                _teacher_cost(method),
                _counted(method),
                wording.count(method.tokens),
                wording.count(method.total_tokens),
                wording.seconds(method.seconds),
                wording.seconds(method.total_seconds),
                wording.seconds_reached(method),
                wording.seconds_reached(method, total=True),
            )
            for method in comparison.methods
        ),
        "Means over the runs. Seconds are those inside training steps, without evaluation.",
    )


def paired_table(table: PairedTable, comparison: Comparison) -> TextTable:
    """One comparison: paired differences with their interval, test and verdict."""
    note = {
        "equal_steps": "Every student trained for as many steps as the reference. A start taken "
        "from a teacher has had that teacher\u2019s training on top, which this table leaves out.",
        "equal_budget": "The reference trained for the teacher\u2019s and the student\u2019s steps "
        "together: this table asks whether the detour over a teacher pays.",
        "sunk_teacher": "The teacher was there before, and its cost is sunk: it is stated, not "
        "counted. This table asks what a teacher that costs nothing more is worth.",
    }[table.name]
    if table.name == "sunk_teacher":
        costs = [
            f"{wording.named(row.label)}: {_teacher_cost(comparison.method(row.method))}"
            for row in table.rows
        ]
        note = f"{note} Sunk cost: {'; '.join(costs)}."
    return TextTable(
        TABLE_TITLES[table.name],
        ("method", "difference", "95 % interval", "p", "p (Holm)", "seeds", "verdict"),
        tuple(
            (
                row.label,
                wording.signed(row.result.mean),
                wording.interval(row.result),
                wording.p_value(row.result.p),
                wording.p_value(row.result.p_holm),
                str(row.result.n),
                wording.verdict(row.result),
            )
            for row in table.rows
        ),
        f"Final eval loss minus that of {table.reference_label} at the same seed; negative favours "
        f"the method. {note}",
        last_is_text=True,
    )


def seeds_table(comparison: Comparison) -> TextTable:
    """Each seed of each method, so that every mean can be checked."""
    return TextTable(
        "Every seed",
        ("method", "seed", "eval loss at step 0", "final eval loss", "steps to reference\u2019s"),
        tuple(
            (
                method.label,
                str(attempt.seed),
                wording.loss(attempt.step0_loss),
                "diverged" if attempt.diverged else wording.loss(attempt.final_loss),
                _steps(attempt),
            )
            for method in comparison.methods
            for attempt in method.attempts
        ),
    )


def sweep_table(sweeps: Sequence[Sweep]) -> TextTable:
    """All learning rates tried, with the one that the compared runs used."""
    rows = []
    for sweep in sweeps:
        for point in sweep.points:
            marks = ["used"] if point.chosen else []
            marks += ["lowest"] if point.lowest else []
            if point.diverged_seeds:
                marks.append(f"{len(point.diverged_seeds)} diverged")
            rows.append(
                (
                    sweep.label,
                    wording.rate(point.learning_rate),
                    str(sweep.steps),
                    str(len(point.seeds)),
                    wording.mean_and_std(point.loss),
                    ", ".join(marks),
                )
            )
    return TextTable(
        "Learning-rate sweep",
        ("method", "learning rate", "steps", "seeds", "eval loss", "remark"),
        tuple(rows),
        "These runs only chose the rates and are in no other table. \u201cUsed\u201d marks the "
        "rate of the compared runs.",
        last_is_text=True,
    )


def settings_table(context: Mapping[str, Any]) -> TextTable:
    """What the caller states of the experiment, nested entries with their path."""
    rows = tuple(_flat("", context))
    return TextTable("Settings", ("setting", "value"), rows, last_is_text=True)


def _flat(prefix: str, values: Mapping[str, Any]):
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(f"{name}: ", value)
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif value is not None:
            yield name, str(value)


def _seeds(method: MethodSummary) -> str:
    diverged = len(method.diverged_seeds)
    return f"{len(method.seeds)} ({diverged} diverged)" if diverged else str(len(method.seeds))


def _teacher_cost(method: MethodSummary) -> str:
    if method.teacher_kind is None:
        return "none"
    stated = {
        "steps": wording.count(method.teacher_steps),
        "tokens": wording.count(method.teacher_tokens),
        "s": wording.seconds(method.teacher_seconds),
    }
    known = [f"{value} {unit}" for unit, value in stated.items() if value != wording.NOT_KNOWN]
    return f"{method.teacher_kind}, {', '.join(known) or 'cost not stated'}"


def _counted(method: MethodSummary) -> str:
    if method.teacher_kind is None:
        return "none"
    return "no, sunk" if method.teacher_sunk else "yes"


def _steps(attempt: Attempt) -> str:
    if attempt.diverged or not attempt.has_reference:
        return wording.NOT_KNOWN
    return wording.count(attempt.reached.steps) if attempt.reached else "not reached"
