"""The learning-rate sweep of each method: which rates were tried, and which one was used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .seed_statistics import Spread, spread
from .trials import Trial


@dataclass(frozen=True)
class SweepPoint:
    """One rate: the final evaluation loss over the runs that stayed finite, None if none did."""

    learning_rate: float
    seeds: tuple[int, ...]
    diverged_seeds: tuple[int, ...]
    loss: Spread | None
    chosen: bool
    lowest: bool


@dataclass(frozen=True)
class Sweep:
    """The rates tried for one method, ascending, after `steps` steps.

    `chosen` is the rate of the method's own runs, None if it has none or they differ.
    """

    method: str
    label: str
    steps: int
    chosen: float | None
    points: tuple[SweepPoint, ...]

    @property
    def lowest(self) -> float | None:
        """The rate of the lowest mean loss among those where no run diverged, if there is one."""
        return next((point.learning_rate for point in self.points if point.lowest), None)

    @property
    def lowest_at_edge(self) -> bool:
        """Whether the lowest loss lies at an end of the grid: a better rate may lie outside."""
        return self.lowest in (self.points[0].learning_rate, self.points[-1].learning_rate)


def read_sweeps(trials: Sequence[Trial]) -> tuple[Sweep, ...]:
    """The sweeps among `trials`, by method.

    Where a method's own runs have a sweep's length and seeds at a rate that no sweep run has,
    they stand for that rate, as the sweep need not repeat them.

    Raises:
        ValueError: if a sweep run states no learning rate, or a method's sweep runs differ in
            length.
    """
    methods = dict.fromkeys(trial.method for trial in trials if trial.sweep)
    return tuple(_sweep([trial for trial in trials if trial.method == name]) for name in methods)


def _sweep(trials: Sequence[Trial]) -> Sweep:
    swept = [trial for trial in trials if trial.sweep]
    own = [trial for trial in trials if not trial.sweep]
    lengths = {trial.steps for trial in swept}
    if len(lengths) > 1:
        raise ValueError(
            f"method {swept[0].method!r}: all runs of a sweep must have the same length, "
            f"got {', '.join(map(str, sorted(lengths)))} steps"
        )
    rates: dict[float, list[Trial]] = {}
    for trial in swept:
        if trial.learning_rate is None:
            raise ValueError(
                f"run {trial.name!r}: a sweep run must state learning_rate in "
                "extra['comparison'], got none"
            )
        rates.setdefault(trial.learning_rate, []).append(trial)
    tried, seeds = set(rates), {trial.seed for trial in swept}
    for trial in own:
        rate = trial.learning_rate
        if rate is not None and rate not in tried and trial.seed in seeds:
            if trial.steps in lengths:
                rates.setdefault(rate, []).append(trial)

    chosen = {trial.learning_rate for trial in own}
    used = chosen.pop() if len(chosen) == 1 else None
    losses = {
        rate: spread([trial.final_loss for trial in group if not trial.diverged])
        for rate, group in rates.items()
    }
    # A rate at which a run diverged is not the best one for what its other seeds did.
    means = {
        rate: loss.mean
        for rate, loss in losses.items()
        if loss is not None and not any(trial.diverged for trial in rates[rate])
    }
    lowest = min(sorted(means), key=means.__getitem__) if means else None
    points = tuple(
        SweepPoint(
            learning_rate=rate,
            seeds=tuple(sorted(trial.seed for trial in rates[rate])),
            diverged_seeds=tuple(sorted(t.seed for t in rates[rate] if t.diverged)),
            loss=losses[rate],
            chosen=rate == used,
            lowest=rate == lowest,
        )
        for rate in sorted(rates)
    )
    return Sweep(swept[0].method, swept[0].label, swept[0].steps, used, points)
