"""Where a run goes on: from the newest checkpoint that is whole, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from peft_svdinit.training import RecipeArguments, fault_of, newest_whole

LAST = "last"


def checkpoint_to_resume(
    arguments: RecipeArguments,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[str], object] = lambda line: None,
) -> str | None:
    """The checkpoint to go on from: the one named, or of "last" the newest whole one, if any.

    All processes call it together and get what the main one finds.

    Args:
        arguments: of the run.
        callbacks: of the run; `needs_of(checkpoint)` of one names the files that it will read.
        report: is given one line on the main process if later checkpoints are passed over.

    Raises:
        ValueError: on all processes, if the one that is named is not whole.
    """
    resume = arguments.resume_from_checkpoint
    if resume is None:
        return None

    def needed(checkpoint: Path) -> Iterable[str]:
        asked = [each for each in callbacks if hasattr(each, "needs_of")]
        return [name for each in asked for name in each.needs_of(checkpoint)]  # pyright: ignore

    told: list[Any] = [None, None]
    if PartialState().is_main_process:
        if resume == LAST:
            path, faults = newest_whole(Path(str(arguments.output_dir)), needed)
            told = [path and str(path), None]
            if faults:
                report(_passed_over(path, faults, arguments))
        else:
            told = [resume, _refusal(Path(resume), needed)]
    broadcast_object_list(told)
    path, refusal = told
    if refusal:
        raise ValueError(refusal)
    return path


def check_checkpoint(arguments: RecipeArguments) -> None:
    """Refuse a named checkpoint that is not whole, on all processes and before any work.

    Raises:
        ValueError: naming what it lacks, and the newest whole one.
    """
    if arguments.resume_from_checkpoint != LAST:
        checkpoint_to_resume(arguments)


def _passed_over(path: Path | None, faults: dict[str, str], arguments: RecipeArguments) -> str:
    why = "; ".join(f"{name} is passed over: {fault}" for name, fault in faults.items())
    if path is None:
        return f"resume: no checkpoint in {arguments.output_dir} is whole, begins anew; {why}"
    return f"resume: goes on from {path.name}; {why}"


def _refusal(checkpoint: Path, needed: Callable[[Path], Iterable[str]]) -> str | None:
    if not checkpoint.is_dir():
        return (
            "resume_from_checkpoint must be last or the folder of a checkpoint; there is no folder "
            f"{checkpoint}"
        )
    fault = fault_of(checkpoint, needed)
    if fault is None:
        return None
    whole, _ = newest_whole(checkpoint.absolute().parent, needed)
    other = f"the newest whole one beside it is {whole}" if whole else "none beside it is whole"
    return f"resume_from_checkpoint: {checkpoint} is not whole, {fault}; {other}"
