"""What is refused before a training with a switch begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_svdinit.files import WrongKind
from peft_svdinit.optim import check_can_carry, state_of_a_matrix
from trainer_callbacks.averaged_models import check_averaged
from trainer_callbacks.learning_rates import sets_rates_anew
from trainer_callbacks.reducer import check_reducer

RECIPE = "recipes/progressive_lowrank.py, which converts the model and goes on in a new Trainer"
_SPLIT = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}


def check_processes(trainer: Trainer) -> None:
    """Refuse parameters that are split among processes.

    Raises:
        ValueError: under FSDP, ZeRO or tensor parallelism.
    """
    kind = trainer.accelerator.distributed_type
    if kind in _SPLIT or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"{kind.value} splits the parameters among processes, so that layers cannot be "
            f"switched in place; use {RECIPE}"
        )


def check_followers(
    trainer: Trainer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    carries: bool,
    factor: float,
    rewarmup_steps: int,
    averaged: Sequence[nn.Module],
) -> None:
    """Refuse what could not follow a switch: model, wrapper, averages, optimizer, scheduler.

    Raises:
        TypeError: for a model that is no PreTrainedModel, or an optimizer whose state cannot be
            carried.
        ValueError: for the others.
    """
    if not isinstance(model, PreTrainedModel):
        raise WrongKind(
            "RankSwitchCallback needs a PreTrainedModel without adapters, got a "
            f"{type(model).__name__}"
        )
    if trainer.args.world_size > 1:
        check_reducer(trainer.model_wrapped)  # pyright: ignore[reportArgumentType]
    check_averaged(averaged, model)
    found = state_of_a_matrix(optimizer) if carries else None
    if found is not None:
        check_can_carry(optimizer, found[0])
    if factor != 1 and any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"learning_rate_factor={factor}: {type(optimizer).__name__} has no learning rate of "
            "its own to be lowered; give it one, or use learning_rate_factor=1"
        )
    if rewarmup_steps and not sets_rates_anew(scheduler):
        raise ValueError(
            "rewarmup_steps needs a schedule that is a function of the step, such as linear, "
            f"cosine or constant, got a {type(scheduler).__name__}"
        )
