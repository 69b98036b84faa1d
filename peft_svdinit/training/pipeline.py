"""Tasks that are done once: skipped when their inputs have not changed, restarted after a kill.

A task works in a folder whose name carries the hash of everything its result depends on, the
hashes of the tasks before it included. A marker written last says that it is complete.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files import write_json
from .refusal import Unfinished

_MARKER = "done.json"


@dataclass(frozen=True, eq=False)
class Task:
    """One unit of work of a pipeline.

    Attributes:
        step: the name of the pipeline's step that it belongs to.
        name: what people call it, unique among tasks of different inputs.
        inputs: everything the result depends on, as JSON values.
        work: does it, in the folder it is given; may find there what a killed attempt left.
        after: tasks whose results it reads.
        cost: expected duration in any unit shared by all tasks, for the time left.
        collective: whether all processes of a distributed run take part, or the main one alone.
    """

    step: str
    name: str
    inputs: Mapping[str, Any]
    work: Callable[[Path], None]
    after: Sequence[Task] = ()
    cost: float = 0.0
    collective: bool = False
    root: Path = field(default=Path("."), kw_only=True)

    @cached_property
    def digest(self) -> str:
        """Hash of the inputs and of the tasks before."""
        content = {"inputs": self.inputs, "after": [task.digest for task in self.after]}
        encoded = json.dumps(content, sort_keys=True, allow_nan=False).encode()
        return hashlib.sha256(encoded).hexdigest()[:10]

    @property
    def folder(self) -> Path:
        """Where the task works."""
        return self.root / f"{self.name}-{self.digest}"

    @property
    def done(self) -> bool:
        """Whether a complete result of exactly these inputs is there."""
        return (self.folder / _MARKER).is_file()

    def mark_done(self, seconds: float) -> None:
        write_json(
            self.folder / _MARKER,
            {"name": self.name, "inputs": dict(self.inputs), "seconds": round(seconds, 3)},
        )


def selected_steps(
    steps: Sequence[str], *, from_step: str | None, to_step: str | None, only: str | None
) -> list[str]:
    """The steps from `from_step` to `to_step`, or `only` one; a step may be given by its number.

    Raises:
        ValueError: for an unknown step, an empty range, or `only` beside a range.
    """
    if only is not None and (from_step is not None or to_step is not None):
        raise ValueError("only cannot be combined with from_step or to_step")
    first = _position(steps, only or from_step, "only" if only else "from_step", 0)
    last = _position(steps, only or to_step, "only" if only else "to_step", len(steps) - 1)
    if first > last:
        raise ValueError(f"from_step={from_step} comes after to_step={to_step}")
    return list(steps[first : last + 1])


def _position(steps: Sequence[str], wanted: str | None, argument: str, default: int) -> int:
    if wanted is None:
        return default
    if wanted in steps:
        return steps.index(wanted)
    if wanted.isdigit() and 1 <= int(wanted) <= len(steps):
        return int(wanted) - 1
    numbered = ", ".join(f"{number} {step}" for number, step in enumerate(steps, 1))
    raise ValueError(f"{argument} must be one of {numbered}; got {wanted!r}")


def run_tasks(
    tasks: Sequence[Task],
    steps: Sequence[str],
    *,
    report: Callable[[str], None],
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Run the tasks of the given steps in order, skipping those that are done.

    Args:
        tasks: all tasks of the pipeline, in an order in which each comes after what it reads.
        steps: the names of the steps to run.
        report: receives a line before each task, with an estimate of the time left.
        is_main: whether this is the process that runs the tasks that are not collective.
        barrier: waits for all processes.

    Raises:
        Unfinished: if a task of another step, not done, is needed first.
    """
    unique = list({task.folder: task for task in tasks}.values())
    selected = [task for task in unique if task.step in steps]
    chosen = {task.folder for task in selected}
    for task in selected:
        for needed in task.after:
            if not needed.done and needed.folder not in chosen:
                raise Unfinished(
                    f"{task.name} needs {needed.name} of step {needed.step}, which is not done: "
                    f"run that step first (from_step={needed.step})"
                )
    barrier()
    pending = [task for task in selected if not task.done]
    barrier()
    spent_cost = spent_seconds = 0.0
    for number, task in enumerate(selected, 1):
        label = f"[{number}/{len(selected)}] {task.name}"
        if task not in pending:
            report(f"{label}: done before")
            continue
        left = sum(other.cost for other in pending[pending.index(task) :])
        estimate = _duration(left * spent_seconds / spent_cost) if spent_cost else "unknown"
        report(f"{label} (time left: {estimate})")
        began = time.monotonic()
        if is_main or task.collective:
            task.folder.mkdir(parents=True, exist_ok=True)
            task.work(task.folder)
        barrier()
        seconds = time.monotonic() - began
        if is_main:
            task.mark_done(seconds)
        barrier()
        spent_cost += task.cost
        spent_seconds += seconds if task.cost else 0.0


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
