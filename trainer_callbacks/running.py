"""A callback that says what a training runs as, and stops one that is not what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_svdinit.training import RunsAs, note_in
from trainer_callbacks.owning_trainer import calling_trainer

logger = logging.getLogger(__name__)


class RunsAsCallback(TrainerCallback):
    """Before the first step, say what the training runs as; refuse what is not as expected.

    Launchers start one process where several were asked for (`accelerate launch --cpu`), and the
    Trainer runs DDP where FSDP was asked for (on a CPU), both in silence. Checkpoints note what a
    resume is to find in them, see `peft_svdinit.training.fault_of`.

    Args:
        expected_processes: number of processes that train together.
        expected_wrapper: class around the model: `DistributedDataParallel`, `DeepSpeedEngine`,
            `FSDPModule` (FSDP2), or "none".
        expected_stage: 0 to 3, as ZeRO counts: FSDP that reshards after the forward pass is 3.
        report: is given the line on the main process; by default it goes to the log.

    Raises:
        NotAsExpected: a ValueError, where training begins, on all processes.
    """

    def __init__(
        self,
        *,
        expected_processes: int | None = None,
        expected_wrapper: str | None = None,
        expected_stage: int | None = None,
        report: Callable[[str], object] = logger.info,
    ) -> None:
        self.expected = {
            "expected_processes": expected_processes,
            "expected_wrapper": expected_wrapper,
            "expected_stage": expected_stage,
        }
        self.report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer(self)
        if trainer is None:
            raise RuntimeError("RunsAsCallback is for a Trainer; give it in callbacks=[...]")
        runs_as = RunsAs.of(trainer)
        runs_as.check(**self.expected)
        note_in(state, processes=args.world_size, save_only_model=args.save_only_model)
        if state.is_world_process_zero:
            self.report(f"runs as: {runs_as}")
