"""The stages of LoRI as tasks of a pipeline, each done once for the inputs that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_svdinit.masks import LayerScores, Selection, load_scores
from peft_svdinit.training import DataOptions, ModelOptions, RecipeArguments, Task
from stages.comparison_options import ComparisonOptions, Setting
from stages.fit import Materials
from stages.lora_options import LoraOptions
from stages.lori_options import SparseOptions
from stages.lori_stages import calibrate, choose_mask


def run_inputs(
    model: ModelOptions, data: DataOptions, arguments: RecipeArguments
) -> dict[str, Any]:
    """What the result of a training depends on: model, data and arguments of any run."""
    return {
        **Setting(ComparisonOptions(), model, data, LoraOptions(), arguments).inputs,
        "steps": arguments.max_steps,
        "learning_rate": arguments.learning_rate,
        "seeds": [arguments.seed, arguments.data_seed],
    }


def calibration_task(
    name: str,
    *,
    root: Path,
    inputs: Mapping[str, Any],
    materials: Callable[[], Materials],
    model: ModelOptions,
    sparse: SparseOptions,
    seed: int,
    arguments: RecipeArguments,
    score: str = "magnitude",
    start: str | None = None,
    after: Sequence[Task] = (),
) -> Task:
    """The calibration run, whose folder gets the scores of all entries of B.

    Args:
        inputs: `run_inputs`, and what identifies `start` unless a task `after` which it runs does.
        seed: of A.
        score: as `LoriCalibrationCallback` takes it.
        start: adapter that B begins as.
    """
    return Task(
        step="calibrate",
        name=name,
        inputs={**inputs, "adapter": sparse.adapter, "lori_seed": seed, "score": score},
        work=lambda folder: calibrate(
            folder,
            materials=materials(),
            model=model,
            config=sparse.config(seed=seed, start=start),
            arguments=arguments,
            score=score,
        ),
        after=after,
        cost=float(arguments.max_steps),
        collective=True,
        root=root,
    )


def mask_task(
    name: str,
    *,
    root: Path,
    sparse: SparseOptions,
    scores: Callable[[], LayerScores] | Task,
    exclude: Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    after: Sequence[Task] = (),
) -> Task:
    """The choice of a mask.

    Args:
        scores: the calibration, or what else gives the scores.
        exclude: masks none of whose entries is taken.
        inputs: what identifies scores and masks to exclude, unless tasks before it do.
    """
    calibrated = isinstance(scores, Task)
    given = partial(load_scores, scores.folder) if calibrated else scores
    return Task(
        step="mask",
        name=name,
        inputs={**(inputs or {}), "selection": _inputs_of(sparse.selection)},
        work=partial(choose_mask, scores=given, sparse=sparse, exclude=exclude),
        after=[*([scores] if calibrated else []), *after],
        root=root,
    )


def _inputs_of(selection: Selection) -> dict[str, Any]:
    return {key: getattr(selection, key) for key in ("density", "scope", "floor")}
