"""One training run, whatever the adapter: what the training recipes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    NotAsExpected,
    RecipeArguments,
    Run,
    Unfinished,
    as_typed,
    completion_collator,
    load_tokenizer,
    prepare_examples,
    read_run,
    read_run_info,
    refusals_in_one_line,
)
from stages.base_config import check_configuration
from stages.held_out import split_of
from stages.processes import check_same_start
from stages.resuming import checkpoint_to_resume
from trainer_callbacks import ComparisonCallback, RunsAsCallback


@dataclass(frozen=True)
class Materials:
    """What runs on one data set share; `source` is what the user calls it, `split` its parts."""

    source: str
    split: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset

    @classmethod
    def prepare(cls, model: ModelOptions, data: DataOptions) -> Materials:
        """Load the tokenizer and the data, and tokenize it."""
        check_configuration(model)
        tokenizer = load_tokenizer(model)
        train, evaluation = prepare_examples(data, tokenizer)
        # The longest first: batches of like lengths waste little on padding.
        lengths = [-len(ids) for ids in evaluation["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return cls(data.dataset_name, split_of(data), tokenizer, train, evaluation.select(order))

    def part(self, seed: int, first: int, count: int) -> Materials:
        """`count` training examples from number `first` on in the order that `seed` shuffles.

        The order goes on with a new shuffle after each epoch, so that runs which share a seed can
        share their examples, or split them.
        """
        generator = torch.Generator().manual_seed(seed)
        size, order = len(self.train), torch.empty(0, dtype=torch.long)
        while len(order) < first + count:
            order = torch.cat([order, torch.randperm(size, generator=generator)])
        return replace(self, train=self.train.select(order[first : first + count].tolist()))

    def batches(self, size: int) -> DataLoader:
        """The training examples in their order, `size` at a time."""
        return DataLoader(
            self.train,  # pyright: ignore[reportArgumentType]
            batch_size=size,
            collate_fn=completion_collator(self.tokenizer),
        )


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without a line per log entry; the run's record has them all."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(
    model: Any,
    materials: Materials,
    arguments: RecipeArguments,
    *,
    extra: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
) -> Run | None:
    """Train, leaving the model and the run's record in `arguments.output_dir`.

    With `resume_from_checkpoint=last` it goes on from the newest whole checkpoint there, if there
    is one, and says which later ones it passes over.

    Returns:
        The run's record, on the main process.

    Raises:
        SystemExit: with one line, where the training would run as something else than the
            arguments expect, or go on from a checkpoint that is not whole.
        RuntimeError: if the processes would begin with different numbers.
    """
    made = {"dataset": materials.source, **materials.split}
    made |= {"command": arguments.invocation} if arguments.invocation else {}
    # New ones, for a process may train twice, and DeepSpeed's plugin makes one Accelerator.
    arguments = replace(arguments, push_to_hub=False)
    check_same_start(model)
    folder = Path(str(arguments.output_dir))
    with refusals_in_one_line([arguments]):
        resume = checkpoint_to_resume(arguments, callbacks, report=print)
    record = ComparisonCallback(name=folder.name, extra={**(extra or {}), **made})
    runs_as = RunsAsCallback(
        expected_processes=arguments.expected_processes,
        expected_wrapper=arguments.expected_wrapper,
        expected_stage=arguments.expected_stage,
        report=_say_once if quiet else print,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=completion_collator(materials.tokenizer),
        train_dataset=_rest(materials.train, arguments, resume),
        eval_dataset=materials.evaluation,
        processing_class=materials.tokenizer,
        callbacks=[runs_as, record, *callbacks],
    )
    if quiet:
        shown = QuietProgress if trainer.pop_callback(ProgressCallback) else None
        trainer.remove_callback(PrinterCallback)
        if shown:
            trainer.add_callback(shown)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except NotAsExpected as error:
        raise SystemExit(f"error: {as_typed(str(error), [arguments])}") from error
    trainer.save_model()
    return read_run(folder) if trainer.is_world_process_zero() else None


@cache
def _say_once(line: str) -> None:
    """What all runs of a recipe share."""
    print(line)


def check_complete(folder: Path, *files: str) -> None:
    """Raise on all processes unless the run in `folder` has a complete record, and `files`.

    Callbacks spare a training what goes wrong while they write; a stage that reads what they wrote
    is not to begin without it.

    Raises:
        Unfinished: naming what is missing.
    """
    missing: list[str] = []
    if PartialState().is_main_process:
        missing += [name for name in files if not (folder / name).is_file()]
        missing += [] if read_run_info(folder)["status"] == "completed" else ["complete record"]
    missing = gather_object(missing)
    if missing:
        raise Unfinished(
            f"the training in {folder} left no {' and no '.join(missing)}: mend what its warnings "
            "name, and run the same command again"
        )


def _rest(train: Dataset, arguments: RecipeArguments, resume: str | None) -> Dataset:
    """The training examples; one step's if the checkpoint to resume from is that of the last step.

    Within an epoch the Trainer would take one step more. After an epoch of one step it takes none.
    """
    state = Path(resume or "", TRAINER_STATE_NAME)
    if resume is None or arguments.max_steps < 1 or not state.is_file():
        return train
    if TrainerState.load_from_json(str(state)).global_step < arguments.max_steps:
        return train
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return train.select(range(min(step, len(train))))


def outcome(run: Run) -> str:
    """The last evaluation in words, if there was one."""
    loss = run.final_eval_loss
    return "not evaluated" if loss is None else f"eval_loss {loss:.4f}"
