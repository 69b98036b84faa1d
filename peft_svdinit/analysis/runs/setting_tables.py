"""What it took, as tables of text: cost, learning rates tried, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import wording
from .compare import Comparison
from .summaries import MethodSummary
from .sweeps import Sweep, SweepPoint
from .tables import TextTable, reached, text_table


def cost_table(comparison: Comparison) -> TextTable:
    """Tokens and seconds, the student's own and with the teacher's."""
    reference = comparison.method(comparison.reference).label
    return text_table(
        comparison.methods,
        {
            "method": lambda m: m.label,
            "teacher": _teacher,
            "tokens": lambda m: wording.count(m.tokens),
            "total tokens": lambda m: wording.count(m.total_tokens),
            "training seconds": lambda m: wording.seconds(m.seconds),
            "total seconds": lambda m: wording.seconds(m.total_seconds),
            f"seconds to {reference}\u2019s final loss": seconds_reached,
            "the same, with the teacher\u2019s": lambda m: seconds_reached(m, total=True),
        },
        "Means over the runs. Seconds are those inside training steps, without evaluation. Totals "
        "include the teacher\u2019s unless its cost is sunk.",
    )


def sweep_table(sweeps: Sequence[Sweep]) -> TextTable:
    """All learning rates tried, with the one that the compared runs used."""
    return text_table(
        [(sweep, point) for sweep in sweeps for point in sweep.points],
        {
            "method": lambda row: row[0].label,
            "learning rate": lambda row: wording.rate(row[1].learning_rate),
            "steps": lambda row: str(row[0].steps),
            "seeds": lambda row: str(len(row[1].seeds)),
            "eval loss": lambda row: wording.mean_and_std(row[1].loss),
            "remark": lambda row: _remark(*row),
        },
        "These runs only chose the rates and are in no other table. \u201cUsed\u201d marks the "
        "rate of the compared runs; beyond an edge a better one may lie.",
        last_is_text=True,
    )


def settings_table(context: Mapping[str, Any]) -> TextTable:
    """What the caller states of the experiment, nested entries with their path."""
    return TextTable(("setting", "value"), tuple(_flat("", context)), last_is_text=True)


def seconds_reached(method: MethodSummary, *, total: bool = False) -> str:
    """Mean seconds of training until the reference's final loss, and in how many seeds."""
    values = [a.reached.seconds for a in method.comparable if a.reached]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return wording.NOT_KNOWN
    extra = 0.0 if not total or method.teacher_sunk else method.teacher_seconds or 0.0
    return reached(method, known, extra, wording.seconds)


def _teacher(method: MethodSummary) -> str:
    if method.teacher_kind is None:
        return "none"
    stated = {
        "steps": wording.count(method.teacher_steps),
        "tokens": wording.count(method.teacher_tokens),
        "s": wording.seconds(method.teacher_seconds),
    }
    known = [f"{value} {unit}" for unit, value in stated.items() if value != wording.NOT_KNOWN]
    counted = "sunk" if method.teacher_sunk else "counted"
    return wording.listed([method.teacher_kind, *(known or ["cost not stated"]), counted])


def _remark(sweep: Sweep, point: SweepPoint) -> str:
    edge = " at the edge" if sweep.lowest_at_edge and len(sweep.points) > 1 else ""
    diverged = len(point.diverged_seeds)
    marks = {
        "used": point.chosen,
        f"lowest{edge}": point.lowest,
        f"{diverged} diverged": diverged > 0,
    }
    return wording.listed(mark for mark, applies in marks.items() if applies)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(f"{name}: ", value)
        elif value is not None:
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)
