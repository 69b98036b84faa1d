"""From run folders to trials: what a run says of itself is checked here, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ...training import EVAL_PREFIX, Run
from .trials import Budget, Evaluation, Teacher, TeacherKind, Trial

EVAL_LOSS = "eval_loss"


def is_evaluation_loss(name: str) -> bool:
    """Whether a logged number is `eval_loss`, or `eval_<set>_loss` of one of several sets."""
    return name.startswith(EVAL_PREFIX) and name.endswith("_loss")


def read_trial(run: Run, metric: str = EVAL_LOSS) -> Trial:
    """What a comparison needs of `run`; without `extra["comparison"]` its method is its name.

    Args:
        run: the run.
        metric: the evaluation loss that counts, `eval_math_loss` of several evaluation sets say.

    Raises:
        ValueError: if the run did not complete, logged no such loss, or describes its method
            with a budget or teacher this comparison does not know.
    """
    info, name = run.info, run.name
    if not run.completed:
        raise ValueError(
            f"run {name!r}: status must be 'completed', got {info['status']!r}; "
            f"resume or repeat the training in {run.directory}"
        )
    evaluations = _evaluations(run.log, metric)
    if not evaluations:
        others = _losses(run.log)
        remedy = "train it with an evaluation set and eval_strategy='steps'"
        if others:
            remedy = f"choose another metric, of {', '.join(others)}"
        raise ValueError(f"run {name!r}: its log holds no {metric} to compare; {remedy}")
    about = run.comparison or {}
    losses = [point.loss for point in evaluations]
    losses += [row["loss"] for row in run.log if row.get("loss") is not None]
    return Trial(
        name=name,
        method=str(about.get("method") or name),
        label=str(about.get("label") or about.get("method") or name),
        budget=_one_of(Budget, about.get("budget", "student"), name, "budget"),
        seed=run.seed,
        data_seed=info["data_seed"],
        learning_rate=about.get("learning_rate"),
        sweep=bool(about.get("sweep", False)),
        teacher=_teacher(about.get("teacher"), name),
        steps=info["steps"],
        tokens=info["tokens"],
        seconds=info["seconds"],
        total_parameters=info["total_parameters"],
        evaluations=evaluations,
        diverged=not all(math.isfinite(loss) for loss in losses),
    )


def _losses(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluation losses that were logged."""
    logged = {name for row in log for name, value in row.items() if value is not None}
    return sorted(filter(is_evaluation_loss, logged))


def _evaluations(log: Sequence[Mapping[str, Any]], metric: str) -> tuple[Evaluation, ...]:
    """The evaluations in a log; the last one counts where a step was evaluated twice.

    Tokens and seconds that an evaluation's row lacks are those of another row of its step.
    """
    known: dict[str, dict[int, Any]] = {metric: {}, "tokens": {0: 0}, "seconds": {0: 0.0}}
    for row in log:
        for column, values in known.items():
            if row.get(column) is not None:
                values[row["step"]] = row[column]
    losses, tokens, seconds = known.values()
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
