"""lm-evaluation-harness on a base model and its adapters, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from peft_svdinit.training import ModelOptions, resolve_model
from stages.evaluation_options import AdaptedModelOptions, HarnessOptions


def check_harness(options: HarnessOptions, model: AdaptedModelOptions) -> None:
    """Raise unless the harness is installed, knows the tasks and loads the model, if there are any.

    Raises:
        ModuleNotFoundError: with the command that installs it.
        ValueError: for unknown tasks, a folder of tasks that is not there, or a model in few bits.
    """
    if options.lm_eval_tasks is None:
        return
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, option):
            raise ValueError(
                f"{option} and lm_eval_tasks exclude each other: lm-evaluation-harness loads the "
                "model itself, and transformers 5 takes no such argument of it; leave one out"
            )
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "lm_eval_tasks need lm-evaluation-harness; run: pip install lm_eval"
        )
    folder = options.lm_eval_include_path
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"lm_eval_include_path must be a folder, got {folder!r}")
    known = set(_task_manager(options).all_tasks)
    unknown = [task for task in options.lm_eval_tasks if task not in known]
    if unknown:
        raise ValueError(
            f"lm_eval_tasks: lm-evaluation-harness has no task {', '.join(unknown)}; add it by "
            "lm_eval_include_path, or see: lm_eval ls tasks"
        )


def harness_results(
    options: HarnessOptions,
    model: ModelOptions,
    adapter: Path | None,
    *,
    device: str,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """The figures of each task, by metric, of the base or of one adapter on it.

    The harness loads the model itself, as `lm_eval --model hf --model_args ...,peft=...` does, so
    that the figures are those that anybody gets.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=harness_arguments(model, adapter),
        tasks=options.lm_eval_tasks,
        task_manager=_task_manager(options),
        limit=options.lm_eval_limit,
        device=device,
        batch_size=batch_size,
    )
    return {
        task: {name: value for name, value in figures.items() if isinstance(value, float | int)}
        for task, figures in found["results"].items()
    }


def harness_arguments(model: ModelOptions, adapter: Path | None) -> dict[str, Any]:
    """`--model_args` of the harness for a base model and, on it, an adapter."""
    arguments: dict[str, Any] = {
        "pretrained": resolve_model(model.model_name_or_path),
        "revision": model.model_revision,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
    }
    if model.attn_implementation:
        arguments["attn_implementation"] = model.attn_implementation
    return arguments if adapter is None else {**arguments, "peft": str(adapter)}


def _task_manager(options: HarnessOptions) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=options.lm_eval_include_path)
