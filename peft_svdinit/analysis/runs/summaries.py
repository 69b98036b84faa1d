"""A method over its seeds: its losses, where it met the reference's, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .seed_statistics import Spread, spread
from .trials import Evaluation, Trial


@dataclass(frozen=True)
class Reached:
    """Where a run's evaluation loss first met a target, in the student's own steps and seconds."""

    steps: float
    seconds: float | None


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


def first_reached(evaluations: Sequence[Evaluation], target: float) -> Reached | None:
    """The first crossing of `target` from above, linear between evaluations; None if never.

    A run whose first evaluation is at or below the target reached it there. The seconds are
    interpolated likewise, or None where the log has none.
    """
    before: Evaluation | None = None
    for after in evaluations:
        if after.loss <= target:
            if before is None:
                return Reached(float(after.step), after.seconds)
            share = (before.loss - target) / (before.loss - after.loss)
            seconds = None
            if before.seconds is not None and after.seconds is not None:
                seconds = before.seconds + share * (after.seconds - before.seconds)
            return Reached(before.step + share * (after.step - before.step), seconds)
        before = after
    return None


def summarise(group: Sequence[Trial], reference: Sequence[Trial]) -> MethodSummary:
    """The runs of one method, none of them of a sweep, against those of the reference."""
    first = group[0]
    targets = {trial.seed: trial.final_loss for trial in reference if not trial.diverged}
    finite = [trial for trial in group if not trial.diverged]
    teachers = [trial.teacher for trial in group if trial.teacher is not None]
    return MethodSummary(
        method=first.method,
        label=first.label,
        budget=first.budget,
        learning_rate=first.learning_rate,
        teacher_kind=first.teacher.kind if first.teacher else None,
        teacher_sunk=first.sunk,
        attempts=tuple(_attempt(trial, targets) for trial in group),
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


def _attempt(trial: Trial, targets: Mapping[int, float]) -> Attempt:
    known = trial.seed in targets
    if trial.diverged:
        return Attempt(trial.seed, True, None, None, known, None)
    reached = first_reached(trial.evaluations, targets[trial.seed]) if known else None
    return Attempt(trial.seed, False, trial.step0_loss, trial.final_loss, known, reached)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
