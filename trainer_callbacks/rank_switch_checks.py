"""What is refused before a training with a switch begins."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_svdinit.files import WrongKind
from peft_svdinit.low_rank import LowRankPlan, check_names, check_plan, check_rule, low_rank_layers
from peft_svdinit.optim import check_can_carry, state_of_a_matrix
from trainer_callbacks.averaged_models import check_averaged
from trainer_callbacks.learning_rates import can_scale, sets_rates_anew
from trainer_callbacks.rank_switch_options import SwitchOptions
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
    options: SwitchOptions,
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
    if trainer.args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size begins anew with the model as it is, of low rank perhaps; set "
            "per_device_train_batch_size"
        )
    if trainer.args.world_size > 1:
        check_reducer(trainer.model_wrapped)  # pyright: ignore[reportArgumentType]
    check_averaged(options.averaged_models, model)
    found = state_of_a_matrix(optimizer) if options.carried else None
    if found is not None:
        check_can_carry(optimizer, found[0], options.carried[0])
    kind, factor = type(optimizer).__name__, options.learning_rate_factor
    if factor != 1 and any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"learning_rate_factor={factor}: {kind} has no learning rate of its own to be lowered; "
            "give it one, or use learning_rate_factor=1"
        )
    kind = type(scheduler).__name__
    if factor != 1 and not can_scale(scheduler):
        raise ValueError(
            f"learning_rate_factor={factor}: a {kind} goes between rates of its own, which are not "
            "lowered; use another schedule, or learning_rate_factor=1"
        )
    if options.rewarmup_steps and not sets_rates_anew(scheduler):
        raise ValueError(
            "rewarmup_steps needs a schedule that is a function of the step, such as linear, "
            f"cosine or constant, got a {kind}"
        )


def check_model(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: SwitchOptions, switched: bool
) -> None:
    """Refuse a model that is not as the switches so far left it, or that no rule fits.

    Raises:
        ValueError: naming a layer.
    """
    low = low_rank_layers(model)
    if low and not switched:
        raise ValueError(
            f"the model is of low rank already ({next(iter(low))} and {len(low) - 1} other "
            "layers), and nothing is left to switch; train it without this callback"
        )
    if switched and not low:
        raise ValueError(
            "the checkpoint was saved after a switch to low rank, but the model is dense: pass "
            "the callback when the Trainer is made, in callbacks=[...]"
        )
    if switched:
        return
    # What would fail at the switch is better known now.
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for number, (_, rule) in enumerate(options.stages):
        if isinstance(rule, LowRankPlan):
            names = check_plan(model, rule)
        elif not number:
            names = check_rule(model, rule)
        else:
            # Which layers and ranks there will be to lower is not known yet, but their names are.
            check_names(model, rule)
            continue
        for name in names:
            weight: Any = model.get_submodule(name).weight
            if weight.requires_grad and id(weight) not in held:
                raise ValueError(
                    f"layer {name}: the optimizer does not hold its weight, so that its factors "
                    "would never be trained; give it all that is trained, or exclude the layer"
                )
