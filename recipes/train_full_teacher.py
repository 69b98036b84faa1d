"""Fine-tune every parameter of a model: a real teacher, whose delta `svdinit extract` takes.

accelerate launch recipes/train_full_teacher.py --output_dir runs/teacher --learning_rate 2e-5
"""

from __future__ import annotations

from typing import Any

from stages.fit import Materials, fit, outcome

from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    Run,
    load_model,
    parse_options,
    refusal,
)


def train_full_teacher(
    materials: Materials,
    model: ModelOptions,
    arguments: RecipeArguments,
    *,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run | None:
    """One run as the options say; its record, on the main process."""
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError("a quantised model cannot be fully fine-tuned; drop load_in_4bit/8bit")
    return fit(load_model(model), materials, arguments, extra=extra, quiet=quiet)


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, RecipeArguments)
    model, data, arguments = parse_options(classes, argv, description=__doc__ or "")
    try:
        run = train_full_teacher(Materials.prepare(model, data), model, arguments)
    except Exception as error:
        message = refusal(error, (model, data, arguments))
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from error
    if run is not None:
        print(f"{outcome(run)}; model and record in {run.directory}")


if __name__ == "__main__":
    main()
