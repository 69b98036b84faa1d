"""What came out, as tables of text: the report and the page print the same cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import wording
from .compare import Comparison
from .paired_tables import PairedTable
from .summaries import Attempt, MethodSummary
from .verdicts import verdict

Row = TypeVar("Row")

TABLE_TITLES = {
    "equal_steps": "Equal student steps",
    "equal_budget": "Equal total budget",
    "sunk_teacher": "A teacher that exists already",
}
_NOTES = {
    "equal_steps": "Every student trained for as many steps as the reference; a teacher\u2019s "
    "training comes on top and is left out here.",
    "equal_budget": "The reference trained for the teacher\u2019s and the student\u2019s steps "
    "together: does the detour over a teacher pay?",
    "sunk_teacher": "The teacher was there before: its cost is stated, not counted.",
}


@dataclass(frozen=True)
class TextTable:
    """Cells as plain text, neither escaped nor marked up; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    last_is_text: bool = False


def text_table(
    rows: Iterable[Row],
    columns: Mapping[str, Callable[[Row], str]],
    note: str = "",
    *,
    last_is_text: bool = False,
) -> TextTable:
    """A table of what each column, by its heading, says of each row."""
    cells = tuple(tuple(cell(row) for cell in columns.values()) for row in rows)
    return TextTable(tuple(columns), cells, note, last_is_text)


def results_table(comparison: Comparison) -> TextTable:
    """The main table: what each method reached, after how much training."""
    reference = comparison.method(comparison.reference)
    return text_table(
        comparison.methods,
        {
            "method": lambda m: m.label,
            "final eval loss": lambda m: wording.mean_and_std(m.final),
            "eval loss at step 0": lambda m: _step0(m, reference),
            "steps": lambda m: wording.count(m.steps),
            "total steps": lambda m: wording.count(m.total_steps),
            f"steps to {reference.label}\u2019s final loss": steps_reached,
            "the same, with the teacher\u2019s": lambda m: steps_reached(m, total=True),
            "learning rate": lambda m: wording.rate(m.learning_rate),
            "seeds": _seeds,
        },
        "Final eval loss: mean \u00b1 sample standard deviation over seeds, lower is better. At "
        "step 0 only the start counts; in brackets the share that it holds of the "
        "reference\u2019s progress. Total steps include the teacher\u2019s unless its cost is "
        "sunk. Steps to the reference\u2019s final loss are counted within one seed, linear "
        "between evaluations.",
    )


def paired_table(table: PairedTable) -> TextTable:
    """One comparison: paired differences with their interval, test and verdict."""
    return text_table(
        table.rows,
        {
            "method": lambda row: row.label,
            "difference": lambda row: wording.signed(row.result.mean),
            "95 % interval": lambda row: wording.interval(row.result),
            "p": lambda row: wording.p_value(row.result.p),
            "p (Holm)": lambda row: wording.p_value(row.result.p_holm),
            "seeds": lambda row: str(row.result.n),
            "verdict": lambda row: verdict(row.result),
        },
        f"Final eval loss minus that of {table.reference_label} at the same seed; negative favours "
        f"the method. Paired two-sided t-test: lower or higher where the interval excludes 0 and "
        f"p (Holm) is below 0.05. {_NOTES[table.name]}",
        last_is_text=True,
    )


def seeds_table(comparison: Comparison) -> TextTable:
    """Each seed of each method, so that every mean can be checked."""
    attempts = [(m.label, attempt) for m in comparison.methods for attempt in m.attempts]
    return text_table(
        attempts,
        {
            "method": lambda row: row[0],
            "seed": lambda row: str(row[1].seed),
            "eval loss at step 0": lambda row: wording.loss(row[1].step0_loss),
            "final eval loss": lambda row: (
                "diverged" if row[1].diverged else wording.loss(row[1].final_loss)
            ),
            "steps to reference\u2019s": lambda row: _steps(row[1]),
        },
    )


def steps_reached(method: MethodSummary, *, total: bool = False) -> str:
    """Mean steps until the reference's final loss over the seeds that reached it, and how many."""
    extra = method.total_steps - method.steps if total else 0.0
    steps = [a.reached.steps for a in method.comparable if a.reached]
    return reached(method, steps, extra, wording.count)


def reached(
    method: MethodSummary, values: Sequence[float], extra: float, written: Callable[[float], str]
) -> str:
    possible = len(method.comparable)
    if not possible:
        return wording.NOT_KNOWN
    if not values:
        return "not reached"
    text = written(sum(values) / len(values) + extra)
    return text if len(values) == possible else f"{text} ({len(values)} of {possible} seeds)"


def _step0(method: MethodSummary, reference: MethodSummary) -> str:
    """The loss of the start, and how much of the reference's progress that is."""
    if not method.step0:
        return wording.NOT_KNOWN
    text = wording.loss(method.step0.mean)
    if not (reference.step0 and reference.final):
        return text
    progress = reference.step0.mean - reference.final.mean
    ahead = reference.step0.mean - method.step0.mean
    if progress <= 0 or abs(ahead) < 0.001 * progress:
        return text
    return f"{text} ({wording.share(ahead / progress)})"


def _seeds(method: MethodSummary) -> str:
    diverged = len(method.diverged_seeds)
    return f"{len(method.seeds)} ({diverged} diverged)" if diverged else str(len(method.seeds))


def _steps(attempt: Attempt) -> str:
    if attempt.diverged or not attempt.has_reference:
        return wording.NOT_KNOWN
    return wording.count(attempt.reached.steps) if attempt.reached else "not reached"
