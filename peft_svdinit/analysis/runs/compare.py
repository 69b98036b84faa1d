"""From runs to numbers: methods over their seeds, paired differences, sweeps, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...training import Run
from .fairness import fairness_warnings
from .paired_tables import PairedTable, paired_tables
from .reading import EVAL_LOSS, is_evaluation_loss, read_trial
from .summaries import MethodSummary, summarise
from .sweeps import Sweep, read_sweeps
from .trials import Trial


@dataclass(frozen=True)
class Comparison:
    """Everything the report says, as data.

    `methods` holds the reference first, then the reference at the total budget, then the others
    in order of their runs; `tables` only those that have rows.
    """

    metric: str
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
    runs: Sequence[Run],
    *,
    reference: str = "random",
    total_reference: str | None = None,
    metric: str = EVAL_LOSS,
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
        metric: the evaluation loss that is compared: of runs with several evaluation sets, that of
            one, `eval_math_loss` say.

    Raises:
        ValueError: if a run is not completed or has no evaluation, a method has two runs of one
            seed or contradicts itself between runs, or the reference has no run.
        ImportError: if a test is due and scipy is missing.
    """
    if not runs:
        raise ValueError("runs must hold at least the reference's run, got none")
    if not is_evaluation_loss(metric):
        raise ValueError(
            f"metric must be an evaluation loss, eval_loss or eval_<set>_loss, got {metric!r}"
        )
    trials = tuple(read_trial(run, metric) for run in runs)
    groups = _group(trial for trial in trials if not trial.sweep)
    total = total_reference or f"{reference}_total"
    required = {"reference": reference} | ({"total_reference": total} if total_reference else {})
    for argument, name in required.items():
        if name not in groups:
            raise ValueError(
                f"{argument} must be a method with a run, got {name!r}; the runs hold "
                f"{', '.join(sorted(groups)) or 'sweep runs only'}; "
                f"train it, or name another one as {argument}"
            )
    _check_consistent(groups)
    first = [name for name in (reference, total) if name in groups]
    groups = {name: groups[name] for name in [*first, *groups]}
    spent = total if total in groups else None
    return Comparison(
        metric=metric,
        reference=reference,
        total_reference=spent,
        methods=tuple(summarise(group, groups[reference]) for group in groups.values()),
        tables=paired_tables(groups, reference, spent),
        sweeps=read_sweeps(trials),
        warnings=fairness_warnings(runs, trials, groups, reference, total),
        trials=trials,
    )


def _group(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Trials by method, each list in order of its seeds."""
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    return {name: sorted(group, key=lambda trial: trial.seed) for name, group in by_method.items()}


def _check_consistent(groups: Mapping[str, Sequence[Trial]]) -> None:
    for name, group in groups.items():
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
