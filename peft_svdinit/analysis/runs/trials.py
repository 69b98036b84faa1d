"""One finished run as the comparison sees it: what it started from, its evaluations, its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ...training import Run

Budget = Literal["student", "total"]
TeacherKind = Literal["synthesised", "full", "given"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; `tokens` and `seconds` are the student's own up to it, None if not logged."""

    step: int
    loss: float
    tokens: int | None
    seconds: float | None


@dataclass(frozen=True)
class Teacher:
    """What the start came from, and its training; only a sunk cost may be unknown (None)."""

    kind: TeacherKind
    steps: int | None
    tokens: int | None
    seconds: float | None
    sunk: bool


class Cost(NamedTuple):
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A run read for comparison. `steps`, `tokens` and `seconds` are the student's own.

    `evaluations` are in order of their steps, one for each step. `diverged` says that a training
    or evaluation loss was not finite; such a run counts, but enters no mean.
    """

    name: str
    method: str
    label: str
    budget: Budget
    seed: int
    data_seed: int | None
    learning_rate: float | None
    sweep: bool
    teacher: Teacher | None
    steps: int
    tokens: int | None
    seconds: float | None
    total_parameters: int | None
    evaluations: tuple[Evaluation, ...]
    diverged: bool

    @property
    def step0_loss(self) -> float | None:
        """The loss before any training of the student; None if it was not evaluated."""
        return self.evaluations[0].loss if self.evaluations[0].step == 0 else None

    @property
    def final_loss(self) -> float:
        return self.evaluations[-1].loss

    @property
    def counted_teacher(self) -> Teacher | None:
        """The teacher whose cost belongs to this run; None for a sunk one."""
        return self.teacher if self.teacher is not None and not self.teacher.sunk else None

    @property
    def head_start(self) -> Cost:
        """The steps, tokens and seconds to count before the run's own: its teacher's, or none."""
        if self.teacher is None or self.teacher.sunk:
            return Cost(0, 0, 0.0)
        teacher = self.teacher
        return Cost(teacher.steps or 0, teacher.tokens or 0, teacher.seconds or 0.0)

    @property
    def spends_total(self) -> bool:
        """Whether its fair reference is the one that trained for the total budget."""
        return self.budget == "total" or self.counted_teacher is not None

    @property
    def total_steps(self) -> int:
        return self.steps + self.head_start.steps

    @property
    def total_tokens(self) -> int | None:
        return None if self.tokens is None else self.tokens + self.head_start.tokens

    @property
    def total_seconds(self) -> float | None:
        return None if self.seconds is None else self.seconds + self.head_start.seconds


@dataclass(frozen=True)
class Reached:
    """Where a run's evaluation loss first met a target, in the student's own steps and seconds."""

    steps: float
    seconds: float | None


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


def read_trial(run: Run) -> Trial:
    """What a comparison needs of `run`; without `extra["comparison"]` its method is its name.

    Raises:
        ValueError: if the run did not complete, logged no `eval_loss`, or describes its method
            with a budget or teacher this comparison does not know.
    """
    info = run.info
    name = str(info.get("name") or Path(run.directory).name)
    if info.get("status") != "completed":
        raise ValueError(
            f"run {name!r}: status must be 'completed', got {info.get('status')!r}; "
            f"resume or repeat the training in {run.directory}"
        )
    evaluations = _evaluations(run.log)
    if not evaluations:
        raise ValueError(
            f"run {name!r}: its log holds no eval_loss to compare; "
            "train it with an evaluation set and eval_strategy='steps'"
        )
    about = (info.get("extra") or {}).get("comparison") or {}
    losses = [point.loss for point in evaluations]
    losses += [row["loss"] for row in run.log if row.get("loss") is not None]
    return Trial(
        name=name,
        method=str(about.get("method") or name),
        label=str(about.get("label") or about.get("method") or name),
        budget=_one_of(Budget, about.get("budget", "student"), name, "budget"),
        seed=int(info["seed"]),
        data_seed=info.get("data_seed"),
        learning_rate=about.get("learning_rate"),
        sweep=bool(about.get("sweep", False)),
        teacher=_teacher(about.get("teacher"), name),
        steps=int(info["steps"]),
        tokens=info.get("tokens"),
        seconds=info.get("seconds"),
        total_parameters=info.get("total_parameters"),
        evaluations=evaluations,
        diverged=not all(math.isfinite(loss) for loss in losses),
    )


def _evaluations(log: Sequence[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    """The evaluations in a log; the last one counts where a step was evaluated twice.

    Tokens and seconds that an evaluation's row lacks are those of another row of its step.
    """
    losses: dict[int, float] = {}
    tokens: dict[int, int] = {0: 0}
    seconds: dict[int, float] = {0: 0.0}
    for row in log:
        step = int(row["step"])
        if row.get("tokens") is not None:
            tokens[step] = row["tokens"]
        if row.get("seconds") is not None:
            seconds[step] = row["seconds"]
        if row.get("eval_loss") is not None:
            losses[step] = row["eval_loss"]
    return tuple(
        Evaluation(step, losses[step], tokens.get(step), seconds.get(step))
        for step in sorted(losses)
    )


def _teacher(about: Mapping[str, Any] | None, name: str) -> Teacher | None:
    if about is None:
        return None
    missing = {"kind", "steps", "tokens", "seconds", "sunk"} - about.keys()
    if missing:
        raise ValueError(
            f"run {name!r}: extra['comparison']['teacher'] must state kind, steps, tokens, "
            f"seconds and sunk; {', '.join(sorted(missing))} missing"
        )
    unknown = [key for key in ("steps", "tokens", "seconds") if about[key] is None]
    if unknown and not about["sunk"]:
        raise ValueError(
            f"run {name!r}: a teacher whose cost is counted must state its {', '.join(unknown)}, "
            "got null; read them from the teacher's run.json, or declare the cost sunk"
        )
    return Teacher(
        kind=_one_of(TeacherKind, about["kind"], name, "teacher.kind"),
        steps=about["steps"],
        tokens=about["tokens"],
        seconds=about["seconds"],
        sunk=bool(about["sunk"]),
    )


def _one_of(choices: Any, value: Any, name: str, argument: str) -> Any:
    if value not in get_args(choices):
        raise ValueError(
            f"run {name!r}: {argument} must be one of {', '.join(get_args(choices))}, got {value!r}"
        )
    return value
