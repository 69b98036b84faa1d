"""Fine-tune every parameter of a model: a real teacher, whose delta `svdinit extract` takes.

accelerate launch recipes/train_full_teacher.py --output_dir runs/teacher --learning_rate 2e-5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.dry_run import DryRunOptions, print_estimate
from stages.fit import Materials, check_complete, fit, outcome
from stages.processes import leave_process_group
from stages.pushing import prepare_push
from stages.resuming import check_checkpoint
from transformers import PreTrainedModel

from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    Run,
    load_model,
    parse_options,
    refusals_in_one_line,
)


def loaded(model: ModelOptions) -> PreTrainedModel:
    """The model with all its parameters to be trained."""
    refuse_quantised(model)
    return load_model(model)


def refuse_quantised(model: ModelOptions) -> None:
    """Raise ValueError for a model that cannot be fully fine-tuned."""
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError("a quantised model cannot be fully fine-tuned; drop load_in_4bit/8bit")


def train_full_teacher(
    materials: Materials,
    model: ModelOptions,
    arguments: RecipeArguments,
    **noted: Any,
) -> Run | None:
    """One run as the options say; its record, on the main process. `noted` is as `fit` takes it."""
    return fit(loaded(model), materials, arguments, **noted)


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, RecipeArguments, DryRunOptions)
    model, data, arguments, dry = parse_options(
        classes, argv, description=__doc__ or "", script=__file__
    )
    with refusals_in_one_line((model, data, arguments, dry)):
        if dry.dry_run:
            refuse_quantised(model)
            return print_estimate(dry, model, data, None, arguments)
        check_checkpoint(arguments)
        push = prepare_push(arguments, model)
        materials, teacher = Materials.prepare(model, data), loaded(model)
        run = fit(teacher, materials, arguments)
        if run is not None:
            print(f"{outcome(run)}; model and record in {run.directory}")
        check_complete(Path(str(arguments.output_dir)))
        push(str(arguments.output_dir))


if __name__ == "__main__":
    main()
    leave_process_group()
