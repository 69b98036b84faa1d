"""From runs to numbers: methods, paired differences at three kinds of budget, sweeps, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...training import Run
from .fairness import fairness_warnings
from .seed_statistics import PairedDifference, Spread, holm, paired_difference, spread
from .sweeps import Sweep, read_sweeps
from .trials import Reached, Trial, first_reached, read_trial

TableName = Literal["equal_steps", "equal_budget", "sunk_teacher"]


@dataclass(frozen=True)
class Attempt:
    """How one seed of a method did against the reference run of the same seed.

    `reached` is where it met that run's final loss; None if never, or if there is no such run.
    """

    seed: int
    diverged: bool
    step0_loss: float | None
    final_loss: float | None
    has_reference: bool
    reached: Reached | None


@dataclass(frozen=True)
class MethodSummary:
    """A method over its seeds. Diverged runs are among the `attempts`, but in no mean.

    `steps`, `tokens` and `seconds` are means of the students' own cost over all runs; with
    `total_` in front they include the teacher's, unless that is sunk. The teacher's own cost is
    None where there is no teacher, or where nobody stated it.
    """

    method: str
    label: str
    budget: str
    learning_rate: float | None
    teacher_kind: str | None
    teacher_sunk: bool
    attempts: tuple[Attempt, ...]
    step0: Spread | None
    final: Spread | None
    steps: float
    tokens: float | None
    seconds: float | None
    teacher_steps: float | None
    teacher_tokens: float | None
    teacher_seconds: float | None
    total_steps: float
    total_tokens: float | None
    total_seconds: float | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(attempt.seed for attempt in self.attempts)

    @property
    def diverged_seeds(self) -> tuple[int, ...]:
        return tuple(attempt.seed for attempt in self.attempts if attempt.diverged)

    @property
    def comparable(self) -> tuple[Attempt, ...]:
        """The attempts that could have reached the reference's final loss."""
        return tuple(a for a in self.attempts if a.has_reference and not a.diverged)


@dataclass(frozen=True)
class PairedRow:
    """A method's final losses minus its reference's, over the seeds both finished."""

    method: str
    label: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    result: PairedDifference


@dataclass(frozen=True)
class PairedTable:
    """Methods compared with one reference at one kind of budget; Holm's correction spans it."""

    name: TableName
    reference: str
    reference_label: str
    rows: tuple[PairedRow, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything the report says, as data.

    `methods` holds the reference first, then the reference at the total budget, then the others
    in order of their runs; `tables` only those that have rows.
    """

    reference: str
    total_reference: str | None
    methods: tuple[MethodSummary, ...]
    tables: tuple[PairedTable, ...]
    sweeps: tuple[Sweep, ...]
    warnings: tuple[str, ...]
    trials: tuple[Trial, ...]

    def method(self, name: str) -> MethodSummary:
        return next(summary for summary in self.methods if summary.method == name)

    def finished(self, method: str) -> tuple[Trial, ...]:
        """The runs of `method` that did not diverge, without those made for the sweep."""
        return tuple(
            trial
            for trial in self.trials
            if trial.method == method and not trial.sweep and not trial.diverged
        )


def compare_runs(
    runs: Sequence[Run], *, reference: str = "random", total_reference: str | None = None
) -> Comparison:
    """Compare the final evaluation losses of `runs` with those of the reference method.

    Pairs are runs of one seed. Methods whose teacher's cost counts are also compared with
    `total_reference`, the reference trained for the teacher's steps as well, and methods with
    the budget "total" with that one only; methods whose teacher is sunk get a table of their
    own. Runs without `extra["comparison"]` are methods by their names.

    Args:
        runs: completed runs of all methods and seeds, in any order.
        reference: the method that all others are compared with.
        total_reference: the method at the total budget, by default `{reference}_total`.

    Raises:
        ValueError: if a run is not completed or has no evaluation, a method has two runs of one
            seed or contradicts itself between runs, or the reference has no run.
        ImportError: if a test is due and scipy is missing.
    """
    if not runs:
        raise ValueError("runs must hold at least the reference's run, got none")
    trials = tuple(read_trial(run) for run in runs)
    by_method = _group(trial for trial in trials if not trial.sweep)
    if reference not in by_method:
        raise ValueError(
            f"reference must be a method with a run, got {reference!r}; "
            f"the runs hold {', '.join(sorted(by_method)) or 'sweep runs only'}; "
            "train it, or name another one as reference"
        )
    total = total_reference or f"{reference}_total"
    if total_reference is not None and total not in by_method:
        raise ValueError(
            f"total_reference must be a method with a run, got {total_reference!r}; "
            f"the runs hold {', '.join(sorted(by_method))}"
        )
    _check_consistent(by_method)
    first = [name for name in (reference, total) if name in by_method]
    order = first + [name for name in by_method if name not in first]
    targets = {t.seed: t.final_loss for t in by_method[reference] if not t.diverged}
    tables = _tables(by_method, order, reference, total if total in by_method else None)
    return Comparison(
        reference=reference,
        total_reference=total if total in by_method else None,
        methods=tuple(_summary(by_method[name], targets) for name in order),
        tables=tables,
        sweeps=read_sweeps(trials),
        warnings=fairness_warnings(
            runs, by_method, [trial for trial in trials if trial.sweep], reference, total
        ),
        trials=trials,
    )


def _group(trials) -> dict[str, list[Trial]]:
    """Trials by method, each list in order of its seeds."""
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    return {name: sorted(group, key=lambda trial: trial.seed) for name, group in by_method.items()}


def _check_consistent(by_method: Mapping[str, list[Trial]]) -> None:
    for name, group in by_method.items():
        seeds = [trial.seed for trial in group]
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            names = ", ".join(trial.name for trial in group if trial.seed in repeated)
            raise ValueError(
                f"method {name!r} must have one run for each seed, got several for seed "
                f"{', '.join(map(str, repeated))} ({names}); leave all but one out"
            )
        for what, values in {
            "label": {trial.label for trial in group},
            "budget": {trial.budget for trial in group},
            "teacher": {t.teacher and (t.teacher.kind, t.teacher.sunk) for t in group},
        }.items():
            if len(values) > 1:
                raise ValueError(
                    f"method {name!r} must have the same {what} in all of its runs, got "
                    f"{', '.join(sorted(map(str, values)))}; give one of them another method id"
                )


def _summary(group: list[Trial], targets: Mapping[int, float]) -> MethodSummary:
    first = group[0]
    finite = [trial for trial in group if not trial.diverged]
    attempts = tuple(
        Attempt(
            seed=trial.seed,
            diverged=trial.diverged,
            step0_loss=None if trial.diverged else trial.step0_loss,
            final_loss=None if trial.diverged else trial.final_loss,
            has_reference=trial.seed in targets,
            reached=None
            if trial.diverged or trial.seed not in targets
            else first_reached(trial.evaluations, targets[trial.seed]),
        )
        for trial in group
    )
    teachers = [trial.teacher for trial in group if trial.teacher is not None]
    return MethodSummary(
        method=first.method,
        label=first.label,
        budget=first.budget,
        learning_rate=first.learning_rate,
        teacher_kind=first.teacher.kind if first.teacher else None,
        teacher_sunk=first.teacher is not None and first.teacher.sunk,
        attempts=attempts,
        step0=spread([t.step0_loss for t in finite if t.step0_loss is not None]),
        final=spread([t.final_loss for t in finite]),
        steps=sum(trial.steps for trial in group) / len(group),
        tokens=_mean([trial.tokens for trial in group]),
        seconds=_mean([trial.seconds for trial in group]),
        teacher_steps=_mean([teacher.steps for teacher in teachers]),
        teacher_tokens=_mean([teacher.tokens for teacher in teachers]),
        teacher_seconds=_mean([teacher.seconds for teacher in teachers]),
        total_steps=sum(trial.total_steps for trial in group) / len(group),
        total_tokens=_mean([trial.total_tokens for trial in group]),
        total_seconds=_mean([trial.total_seconds for trial in group]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _tables(
    by_method: Mapping[str, list[Trial]], order: list[str], reference: str, total: str | None
) -> tuple[PairedTable, ...]:
    others = [by_method[name] for name in order if name not in (reference, total)]
    students = [group for group in others if group[0].budget == "student"]
    not_sunk = [g for g in students if not (g[0].teacher and g[0].teacher.sunk)]
    total_spent = [group for group in others if group[0].spends_total]
    sunk = [group for group in others if group[0].teacher and group[0].teacher.sunk]
    tables = [
        _paired_table("equal_steps", not_sunk, by_method[reference]),
        _paired_table("sunk_teacher", sunk, by_method[reference]),
    ]
    if total is not None:
        tables.insert(1, _paired_table("equal_budget", total_spent, by_method[total]))
    return tuple(table for table in tables if table.rows)


def _paired_table(
    name: TableName, groups: Sequence[list[Trial]], reference: list[Trial]
) -> PairedTable:
    theirs = {trial.seed: trial.final_loss for trial in reference if not trial.diverged}
    rows = []
    for group in groups:
        ours = {t.seed: t.final_loss for t in group if not t.diverged and t.seed in theirs}
        result = paired_difference(list(ours.values()), [theirs[seed] for seed in ours])
        differences = tuple(ours[seed] - theirs[seed] for seed in ours)
        rows.append(PairedRow(group[0].method, group[0].label, tuple(ours), differences, result))
    adjusted = holm([row.result.p for row in rows])
    tests = sum(p is not None for p in adjusted)
    rows = [
        replace(row, result=replace(row.result, p_holm=p, tests=tests))
        for row, p in zip(rows, adjusted, strict=True)
    ]
    return PairedTable(name, reference[0].method, reference[0].label, tuple(rows))
