"""What makes runs less comparable than their table suggests, said in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...training import Run
from .trials import Trial

# Equal steps on differently ordered data differ by a few per cent in tokens.
TOKEN_TOLERANCE = 0.05
# Adapters may differ in size, models do so by more than this.
PARAMETER_TOLERANCE = 0.05

Groups = Mapping[str, Sequence[Trial]]


def fairness_warnings(
    runs: Sequence[Run], groups: Groups, sweep: Sequence[Trial], reference: str, total: str
) -> tuple[str, ...]:
    """All warnings that belong above the results; none for a fair comparison.

    Args:
        runs: every run, those of a sweep included.
        groups: the runs that are not of a sweep, by method.
        sweep: the runs of the learning-rate sweeps.
        reference: the method all others are compared with; must be in `groups`.
        total: the reference at the total budget, which need not be there.
    """
    return (
        *_diverged([trial for group in groups.values() for trial in group] + list(sweep)),
        *_unequal_seeds(groups, groups[reference]),
        *_unequal_evaluations(groups, groups[reference]),
        *_unequal_budgets(groups, groups[reference], groups.get(total), total),
        *_unequal_rates(groups),
        *_unequal_settings(runs),
    )


def _diverged(trials: Iterable[Trial]) -> Iterator[str]:
    for trial in trials:
        if trial.diverged:
            purpose = ", learning-rate sweep" if trial.sweep else ""
            yield (
                f"The run {trial.name} ({trial.label}, seed {trial.seed}{purpose}) diverged: its "
                "loss was not finite. It is counted, but is in no mean and no test."
            )


def _unequal_seeds(groups: Groups, reference: Sequence[Trial]) -> Iterator[str]:
    theirs = {trial.seed: trial for trial in reference}
    for group in groups.values():
        seeds = [trial.seed for trial in group]
        pairs = [(trial, theirs[trial.seed]) for trial in group if trial.seed in theirs]
        if set(seeds) != set(theirs):
            common = _list([trial.seed for trial, _ in pairs])
            yield (
                f"{group[0].label} ran with the seeds {_list(seeds)}, {reference[0].label} with "
                f"{_list(list(theirs))}: "
                + (f"only the common ones ({common}) are paired." if common else "none is paired.")
            )
        shuffled = [ours.seed for ours, other in pairs if ours.data_seed != other.data_seed]
        if shuffled:
            yield (
                f"{group[0].label} and {reference[0].label} used different data seeds at seed "
                f"{_list(shuffled)}: these pairs also differ in the order of the data."
            )


def _unequal_evaluations(groups: Groups, reference: Sequence[Trial]) -> Iterator[str]:
    theirs = _evaluated(reference[0])
    for group in groups.values():
        for trial in group:
            if trial.evaluations[-1].step != trial.steps:
                yield (
                    f"{trial.label}, seed {trial.seed}: the last evaluation is of step "
                    f"{trial.evaluations[-1].step} of {trial.steps}; its final loss is of that "
                    "step."
                )
        # The last evaluation of the shorter run is off the grid, hence the strict bound.
        end = min(group[0].steps, reference[0].steps)
        grids = {tuple(step for step in _evaluated(trial) if step < end) for trial in group}
        if grids != {tuple(step for step in theirs if step < end)}:
            yield (
                f"{group[0].label} was not evaluated at the same steps as {reference[0].label}: "
                "where it reached a loss is interpolated over different distances."
            )


def _evaluated(trial: Trial) -> tuple[int, ...]:
    return tuple(point.step for point in trial.evaluations)


def _unequal_budgets(
    groups: Groups, reference: Sequence[Trial], total: Sequence[Trial] | None, total_name: str
) -> Iterator[str]:
    spending = [
        group
        for group in groups.values()
        if group[0].spends_total and group is not total and group is not reference
    ]
    for group in groups.values():
        if group[0].budget == "student" and group is not reference:
            yield from _unequal(group, reference, "own")
    if spending and total is None:
        yield (
            f"{_list(group[0].label for group in spending)} spent a total budget, the teacher's "
            f"cost included, but no run {total_name!r} trained the reference for as much: what "
            "that budget buys without the teacher is not known."
        )
    for group in spending:
        if total is not None:
            yield from _unequal(group, total, "total")


def _unequal(group: Sequence[Trial], reference: Sequence[Trial], which: str) -> Iterator[str]:
    """Whether pairs of one seed differ in steps, or by more than a few per cent in tokens."""
    theirs = {trial.seed: trial for trial in reference}
    names = f"{group[0].label} and {reference[0].label}"
    for trial in group:
        other = theirs.get(trial.seed)
        if other is None:
            continue
        steps = (trial.steps if which == "own" else trial.total_steps), other.steps
        tokens = (trial.tokens if which == "own" else trial.total_tokens), other.tokens
        if steps[0] != steps[1]:
            yield (
                f"{names} differ in their {which} steps at seed {trial.seed}: "
                f"{steps[0]} and {steps[1]}."
            )
        elif tokens[0] is not None and tokens[1] is not None:
            if abs(tokens[0] - tokens[1]) > TOKEN_TOLERANCE * max(tokens[0], tokens[1]):
                yield (
                    f"{names} differ in their {which} tokens at seed {trial.seed}: "
                    f"{tokens[0]:,} and {tokens[1]:,}."
                )


def _unequal_rates(groups: Groups) -> Iterator[str]:
    for group in groups.values():
        rates = {trial.learning_rate for trial in group}
        if len(rates) > 1:
            yield (
                f"The runs of {group[0].label} differ in their learning rates: "
                f"{_list(sorted(rates, key=lambda rate: rate or 0.0))}."
            )


def _unequal_settings(runs: Sequence[Run]) -> Iterator[str]:
    infos = [run.info for run in runs]
    models = {str(name) for info in infos if (name := _model(info)) is not None}
    sizes = [info["total_parameters"] for info in infos if info.get("total_parameters")]
    if len(models) > 1:
        yield f"The runs are of different models: {_list(sorted(models))}."
    elif sizes and max(sizes) - min(sizes) > PARAMETER_TOLERANCE * max(sizes):
        yield (
            f"The runs are of different models: they have from {min(sizes):,} to {max(sizes):,} "
            "parameters."
        )
    for what, key in {
        "numbers of trainable parameters": "trainable_parameters",
        "numbers of processes (world sizes)": "world_size",
    }.items():
        values = {info[key] for info in infos if info.get(key) is not None}
        if len(values) > 1:
            yield f"The runs have different {what}: {_list(sorted(values))}."
    machines = {
        f"{hardware.get('device')} ({hardware.get('cpu_cores')} cores)"
        for info in infos
        if (hardware := info.get("hardware"))
    }
    if len(machines) > 1:
        yield (
            "The runs are of different machines, so their seconds do not compare: "
            f"{_list(sorted(machines))}."
        )
    versions = {tuple(sorted(info["versions"].items())) for info in infos if info.get("versions")}
    if len(versions) > 1:
        parts = {
            name for one in versions for other in versions for name, _ in set(one) ^ set(other)
        }
        yield f"The runs used different versions of {_list(sorted(parts))}."


def _model(info: Mapping[str, Any]) -> Any:
    extra = info.get("extra") or {}
    return extra.get("model") or extra.get("model_name_or_path")


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
