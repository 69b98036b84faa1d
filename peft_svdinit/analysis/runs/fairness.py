"""What makes runs less comparable than their table suggests, one short line each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from ...training import Run
from .trials import Trial
from .wording import listed

# Equal steps on differently ordered data differ by a few per cent in tokens; adapters may differ
# in size, models do so by more than this.
TOLERANCE = 0.05

Group = Sequence[Trial]


def fairness_warnings(
    runs: Sequence[Run],
    trials: Sequence[Trial],
    groups: Mapping[str, Group],
    reference: str,
    total: str,
) -> tuple[str, ...]:
    """All warnings that belong above the results; none for a fair comparison.

    Args:
        runs, trials: every run and what was read of it, those of a sweep included.
        groups: the runs that are not of a sweep, by method.
        reference: the method all others are compared with; must be in `groups`.
        total: the reference at the total budget, which need not be there.
    """
    ours = groups[reference]
    return (
        *_diverged(trials),
        *(line for group in groups.values() for line in _unequal_seeds(group, ours)),
        *(line for group in groups.values() for line in _unequal_evaluations(group, ours)),
        *_unequal_budgets(groups.values(), ours, groups.get(total), total),
        *(line for group in groups.values() for line in _unequal_rates(group)),
        *_unequal_settings([run.info for run in runs]),
    )


def _diverged(trials: Iterable[Trial]) -> Iterator[str]:
    for trial in trials:
        if trial.diverged:
            purpose = ", learning-rate sweep" if trial.sweep else ""
            yield (
                f"The run {trial.name} ({trial.label}, seed {trial.seed}{purpose}) diverged: it is "
                "counted, but in no mean and no test."
            )


def _unequal_seeds(group: Group, reference: Group) -> Iterator[str]:
    label, other = group[0].label, reference[0].label
    seeds, theirs = [trial.seed for trial in group], {trial.seed: trial for trial in reference}
    common = [trial for trial in group if trial.seed in theirs]
    if set(seeds) != set(theirs):
        paired = f"only the common ones ({listed(trial.seed for trial in common)}) are paired"
        yield (
            f"{label} ran with the seeds {listed(seeds)}, {other} with {listed(theirs)}: "
            f"{paired if common else 'none is paired'}."
        )
    shuffled = [trial.seed for trial in common if trial.data_seed != theirs[trial.seed].data_seed]
    if shuffled:
        yield f"{label} and {other} had different data seeds at seed {listed(shuffled)}."


def _unequal_evaluations(group: Group, reference: Group) -> Iterator[str]:
    for trial in group:
        last = trial.evaluations[-1].step
        if last != trial.steps:
            yield (
                f"{trial.label}, seed {trial.seed}: the last evaluation is of step {last} of "
                f"{trial.steps}."
            )
    # The last evaluation of the shorter run is off the grid, hence the strict bound.
    end = min(group[0].steps, reference[0].steps)
    grids = {
        tuple(point.step for point in trial.evaluations if point.step < end)
        for trial in (*group, reference[0])
    }
    if len(grids) > 1:
        yield (
            f"{group[0].label} was not evaluated at the same steps as {reference[0].label}: where "
            "it reached a loss is interpolated over other distances."
        )


def _unequal_budgets(
    groups: Collection[Group], reference: Group, total: Group | None, total_name: str
) -> Iterator[str]:
    for group in groups:
        if group[0].budget == "student" and group is not reference:
            yield from _unequal_spending(group, reference, "own")
    spending = [g for g in groups if g[0].spends_total and g is not reference and g is not total]
    if spending and total is None:
        yield (
            f"{listed(group[0].label for group in spending)}: no run {total_name!r} spent the same "
            "total budget without a teacher."
        )
    for group in spending:
        yield from _unequal_spending(group, total or (), "total")


def _unequal_spending(group: Group, reference: Group, which: str) -> Iterator[str]:
    """Whether pairs of one seed differ in steps, or by more than a few per cent in tokens."""
    theirs = {trial.seed: trial for trial in reference}
    for trial in group:
        other = theirs.get(trial.seed)
        if other is None:
            continue
        own = which == "own"
        steps = (trial.steps if own else trial.total_steps, other.steps)
        tokens = (trial.tokens if own else trial.total_tokens, other.tokens)
        names = f"{trial.label} and {other.label} differ in their {which}"
        if steps[0] != steps[1]:
            yield f"{names} steps at seed {trial.seed}: {steps[0]} and {steps[1]}."
        elif None not in tokens and _differ(tokens):
            yield f"{names} tokens at seed {trial.seed}: {tokens[0]:,} and {tokens[1]:,}."


def _unequal_rates(group: Group) -> Iterator[str]:
    rates = {trial.learning_rate for trial in group}
    if len(rates) > 1:
        found = listed(sorted(rates, key=lambda rate: rate or 0.0))
        yield f"The runs of {group[0].label} differ in their learning rates: {found}."


def _unequal_settings(infos: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    named = False
    for what, read in SETTINGS.items():
        values = {value for info in infos if (value := read(info)) is not None}
        if len(values) > 1:
            named |= read is _model
            yield f"{what}: {listed(sorted(values))}."
    sizes = [info["total_parameters"] for info in infos if info["total_parameters"]]
    if sizes and not named and _differ(sizes):
        yield f"The runs are of different models: {min(sizes):,} to {max(sizes):,} parameters."
    versions = [set(info["versions"].items()) for info in infos if info["versions"]]
    if versions:
        parts = {name for name, _ in set.union(*versions) - set.intersection(*versions)}
        if parts:
            yield f"The runs used different versions of {listed(sorted(parts))}."


def _model(info: Mapping[str, Any]) -> str | None:
    name = info["extra"].get("model") or info["extra"].get("model_name_or_path")
    return None if name is None else str(name)


def _machine(info: Mapping[str, Any]) -> str | None:
    found = info["hardware"]
    return f"{found.get('device')} ({found.get('cpu_cores')} cores)" if found else None


SETTINGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "The runs are of different models": _model,
    "The runs have different numbers of trainable parameters": itemgetter("trainable_parameters"),
    "The runs have different numbers of processes (world sizes)": itemgetter("world_size"),
    "Seconds do not compare, the runs are of different machines": _machine,
}


def _differ(sizes: Sequence[Any]) -> bool:
    return max(sizes) - min(sizes) > TOLERANCE * max(sizes)
