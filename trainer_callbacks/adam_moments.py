"""Callbacks that keep a teacher's Adam moments and start a student's optimizer from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_svdinit.deltas import LoraAdapter
from peft_svdinit.moments import (
    MOMENTS_FILE_NAME,
    install_moments,
    load_moments,
    save_moments,
)
from peft_svdinit.tuner import lora_scalings

logger = logging.getLogger(__name__)


class SaveMomentsCallback(TrainerCallback):
    """When training ends, write the LoRA weights' Adam moments into the run's folder."""

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and model is not None:
            save_moments(_plain(optimizer), model, Path(str(args.output_dir), MOMENTS_FILE_NAME))


class CarryMomentsCallback(TrainerCallback):
    """Before the first step, rotate a teacher's Adam moments into the basis of the student's start.

    Args:
        teacher: run folder with the teacher's adapter and what `SaveMomentsCallback` wrote.

    Raises:
        FileNotFoundError, ValueError: if the folder lacks one of them.
    """

    def __init__(self, teacher: str) -> None:
        self.teacher = LoraAdapter(teacher)
        path = Path(teacher, MOMENTS_FILE_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"carry_moments_from: {teacher} has no {MOMENTS_FILE_NAME}; train the teacher with "
                "save_moments"
            )
        self.moments = load_moments(path)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step > 0 or model is None:
            return  # a resumed run has its own moments
        scalings = lora_scalings(model)
        count = install_moments(_plain(optimizer), model, self.teacher, self.moments, scalings)
        logger.info("carried the Adam moments of %d layers over from the teacher", count)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
