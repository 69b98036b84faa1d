"""Optimizer and processes after a model's parameters were replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from peft_svdinit.optim import Moved, StateHandling, replace_parameters_
from trainer_callbacks.agreement import check_equal
from trainer_callbacks.reducer import broadcast_, rebuild_reducer_


def take_over_(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    moved: Sequence[Moved],
    handling: StateHandling,
) -> None:
    """Let everything that holds parameters see those that the Trainer's model has now.

    With several processes all have the parameters of the first one afterwards, and the state that
    it has for them.

    Raises:
        RuntimeError: if the processes differ all the same.
    """
    new = {id(p) for each in moved for p in each.new} - {id(p) for each in moved for p in each.old}
    if dist.is_initialized():
        if new and isinstance(trainer.model_wrapped, DistributedDataParallel):
            rebuild_reducer_(trainer.model_wrapped)
        else:
            broadcast_([p.data for each in moved for p in each.new])
    replace_(trainer, optimizer, moved, handling)
    if dist.is_initialized():
        states = [
            value
            for each in moved
            for parameter in each.new
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor) and value.dim()
        ]
        broadcast_(states)
        check_equal(
            {f"{each.name} ({n})": p for each in moved for n, p in enumerate(each.new)},
            "factors after the switch",
        )


def replace_(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    moved: Sequence[Moved],
    handling: StateHandling,
) -> None:
    """Put the new parameters into the optimizer as the Trainer would."""
    model: nn.Module = trainer.model  # pyright: ignore[reportAssignmentType]
    decayed = set(trainer.get_decay_parameter_names(model))
    replace_parameters_(
        optimizer,
        list(model.parameters()),
        moved,
        state=handling,
        spared=[p for name, p in model.named_parameters() if name not in decayed],
    )


def groups_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """By which two optimizers are told to hold the same parameters in the same order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]
