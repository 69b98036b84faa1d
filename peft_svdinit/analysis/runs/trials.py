"""One finished run as the comparison sees it: what it started from, its evaluations, its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    def sunk(self) -> bool:
        """Whether it had a teacher whose cost is not counted."""
        return self.teacher is not None and self.teacher.sunk

    @property
    def counted_teacher(self) -> Teacher | None:
        """The teacher whose cost belongs to this run; None for a sunk one."""
        return None if self.sunk else self.teacher

    @property
    def head_start(self) -> Cost:
        """The steps, tokens and seconds to count before the run's own: its teacher's, or none."""
        teacher = self.counted_teacher
        if teacher is None:
            return Cost(0, 0, 0.0)
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
