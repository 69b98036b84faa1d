"""A switch to low rank between two Trainers, for parameters that are split among processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from peft_svdinit.low_rank import factorize_, load_low_rank, make_plan
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    Run,
    Task,
    Unfinished,
    load_model,
    run_tasks,
    whole_weights,
)
from stages.fit import Materials, check_complete, fit
from stages.lori_stages import remove_checkpoints
from stages.lori_tasks import run_inputs
from stages.low_rank_options import LowRankOptions
from trainer_callbacks import LowRankCheckpointsCallback


def factor_batches(
    materials: Materials, low: LowRankOptions, arguments: RecipeArguments
) -> list[dict[str, Any]] | None:
    """The batches by whose outputs layers are approximated, the same on all processes."""
    if not low.factor_batches:
        return None
    loader = materials.batches(arguments.per_device_train_batch_size)
    return list(islice(loader, low.factor_batches))


def train_in_two(
    materials: Materials,
    model: ModelOptions,
    data: DataOptions,
    low: LowRankOptions,
    arguments: RecipeArguments,
    step: int,
) -> tuple[Run | None, nn.Module]:
    """Train at full rank to `step`, convert, and train on with a new optimizer and schedule.

    The first stage, in a folder within `output_dir`, and the conversion are done once: a run that
    was killed goes on with the one that it was in. Both stages take their own part of one order of
    the training examples.

    Returns:
        The second stage's record, on the main process, and its model.

    Raises:
        Unfinished: if the first stage left no weights in one piece.
    """
    state = PartialState()
    size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    first = materials.part(arguments.seed, 0, step * size)
    second = materials.part(arguments.seed, step * size, (arguments.max_steps - step) * size)
    root = Path(str(arguments.output_dir))
    inputs = run_inputs(model, data, replace(arguments, max_steps=step))
    full = Task(
        "full_rank",
        "full_rank",
        inputs,
        partial(_train_full, first, model, arguments, step),
        collective=True,
        root=root,
    )
    switch = {"rule": low.rule.as_dict(), "factor_batches": low.factor_batches}
    converted = Task(
        "convert",
        "low_rank",
        switch,
        partial(_convert, full.folder, second, model, low, arguments),
        after=[full],
        root=root,
    )
    run_tasks(
        [full, converted],
        ["full_rank", "convert"],
        report=print if state.is_main_process else (lambda line: None),
        is_main=state.is_main_process,
        barrier=state.wait_for_everyone,
    )
    with whole_weights():
        switched = load_low_rank(converted.folder)
    run = fit(
        switched,
        second,
        replace(
            arguments,
            max_steps=arguments.max_steps - step,
            learning_rate=arguments.learning_rate * low.learning_rate_factor,
            warmup_steps=low.rewarmup_steps,
        ),
        extra={"low_rank": {**switch, "switched_at": step, "in_place": False}},
        callbacks=[LowRankCheckpointsCallback()],
    )
    return run, switched


def _train_full(
    materials: Materials, model: ModelOptions, arguments: RecipeArguments, step: int, folder: Path
) -> None:
    first = replace(
        arguments,
        output_dir=str(folder),
        max_steps=step,
        resume_from_checkpoint="last",
        push_to_hub=False,
        load_best_model_at_end=False,
    )
    with whole_weights():
        dense = load_model(model)
    fit(dense, materials, first, quiet=True)
    check_complete(folder)
    remove_checkpoints(first)
    if not any(folder.glob("model*.safetensors")):
        raise Unfinished(
            f"the training at full rank left no weights in one piece in {folder}: with FSDP set "
            "fsdp_state_dict_type to FULL_STATE_DICT, with ZeRO-3 "
            "stage3_gather_16bit_weights_on_model_save to true"
        )


def _convert(
    full: Path,
    materials: Materials,
    model: ModelOptions,
    low: LowRankOptions,
    arguments: RecipeArguments,
    folder: Path,
) -> None:
    with whole_weights():
        dense = load_model(replace(model, model_name_or_path=str(full), model_revision="main"))
    dense.to(arguments.device)  # pyright: ignore[reportArgumentType]
    plan = make_plan(dense, low.rule)
    factorize_(dense, plan, batches=factor_batches(materials, low, arguments))
    dense.save_pretrained(str(folder))
    print(plan.summary())
