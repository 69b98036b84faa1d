"""Callbacks that keep a teacher's Adam moments and start a student's optimizer from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_svdinit.factors import LoraAdapter
from peft_svdinit.files import WrongKind
from peft_svdinit.optim import (
    MOMENTS_FILE_NAME,
    AdamMoments,
    install_moments,
    keeps_moments,
    load_moments,
    lora_parameters,
    save_moments,
)
from peft_svdinit.tuner import lora_scalings
from trainer_callbacks.plain_optimizer import plain
from trainer_callbacks.sparing import Sparing, prepare_folder

logger = logging.getLogger(__name__)


class SaveMomentsCallback(TrainerCallback):
    """When training ends, write the LoRA weights' Adam moments into the run's folder.

    Raises:
        TypeError, ValueError, OSError: where training begins, for an optimizer without such
            moments, a model without a trained LoRA, or a folder that cannot be written to. What
            fails when it ends is a warning.
    """

    def __init__(self) -> None:
        self._spared = Sparing(type(self).__name__)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        optimizer: Any = kwargs.get("optimizer")
        self._spared = Sparing(type(self).__name__)
        _check_optimizer(type(self).__name__, optimizer)
        if model is not None and not lora_parameters(model):
            raise ValueError(
                "SaveMomentsCallback needs a model with a trained LoRA adapter 'default'; leave "
                "the callback out"
            )
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            prepare_folder(folder, type(self).__name__, [MOMENTS_FILE_NAME])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        optimizer: Any = kwargs.get("optimizer")
        if state.is_world_process_zero and model is not None:
            path = Path(str(args.output_dir), MOMENTS_FILE_NAME)
            remedy = "Mend that and resume from the last checkpoint, which has the moments."
            with self._spared(str(path), remedy):
                save_moments(plain(optimizer), model, path)


class CarryMomentsCallback(TrainerCallback):
    """Before the first step, rotate a teacher's Adam moments into the basis of the student's start.

    Args:
        teacher: run folder with the teacher's adapter and what `SaveMomentsCallback` wrote.
        moments: by adapter key, in place of what it wrote.

    Raises:
        FileNotFoundError, ValueError: if the folder lacks one of them.
        TypeError, ValueError: where training begins, for an optimizer without such moments, or a
            student that they cannot be carried over to.
    """

    def __init__(self, teacher: str, moments: Mapping[str, AdamMoments] | None = None) -> None:
        self.teacher = LoraAdapter(teacher, argument="carry_moments_from")
        if moments is not None:
            self.moments = moments
            return
        path = Path(teacher, MOMENTS_FILE_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"carry_moments_from: {teacher} has no {MOMENTS_FILE_NAME}; train the teacher with "
                "save_moments"
            )
        self.moments = load_moments(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        optimizer: Any = kwargs.get("optimizer")
        if state.global_step > 0 or model is None:
            return  # a resumed run has its own moments
        _check_optimizer(type(self).__name__, optimizer)
        scalings = lora_scalings(model)
        count = install_moments(plain(optimizer), model, self.teacher, self.moments, scalings)
        logger.info("carried the Adam moments of %d layers over from the teacher", count)


def _check_optimizer(owner: str, optimizer: Any) -> None:
    """Refuse an optimizer that keeps no Adam moments, or none in one piece; warn where unknown."""
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"{owner} needs the optimizer's state as it is, which {kind.value} splits among "
            "processes; use DDP"
        )
    inner = plain(optimizer)
    kept = keeps_moments(inner)
    if kept is False:
        raise WrongKind(
            f"{owner}: {type(inner).__name__} keeps no Adam moments of LoRA weights; use "
            "optim=adamw_torch or adamw_torch_fused, or leave the callback out"
        )
    if kept is None and PartialState().is_main_process:
        logger.warning(
            "%s cannot tell whether %s keeps Adam moments; optim=adamw_torch and "
            "adamw_torch_fused do",
            owner,
            type(inner).__name__,
        )
