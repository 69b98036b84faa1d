"""A Trainer's layers switched, lowered or balanced, and all that holds them told."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    factorize_,
    low_rank_layers,
    make_plan,
    plan_to_shrink,
    rebalance_,
    shrink_,
)
from trainer_callbacks.averaged_models import follow_, take_layers_
from trainer_callbacks.learning_rates import scale_rates_
from trainer_callbacks.rank_switch_options import SwitchOptions
from trainer_callbacks.taking_over import take_over_


def agreed_plan(
    model: nn.Module, rule: LowRankRule | LowRankPlan
) -> tuple[LowRankPlan | None, str]:
    """The plan that the first process makes, or why the weights allow none.

    All processes take part; whatever fails in the first one is said in all.
    """
    found: tuple[LowRankPlan | None, str] = (None, "")
    if PartialState().is_main_process:
        try:
            if isinstance(rule, LowRankPlan):
                found = rule, ""
            elif low_rank_layers(model):
                found = plan_to_shrink(model, rule), ""
            else:
                found = make_plan(model, rule), ""
        except ValueError as error:
            found = None, str(error)
    [agreed] = broadcast_object_list([found])
    return agreed


def apply_plan_(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    plan: LowRankPlan,
    options: SwitchOptions,
) -> str:
    """Switch the layers of the plan, or lower their ranks; what was done, in words."""
    model: nn.Module = trainer.model  # pyright: ignore[reportAssignmentType]
    if low_rank_layers(model):
        changed = shrink_(model, plan)
        take_over_(trainer, optimizer, [c.moved for c in changed], options.optimizer_state)
        follow_(options.averaged_models, changed)
        return plan.summary()
    switched = factorize_(
        model,
        plan,
        batches=options.batches,
        row_normalise=options.row_normalise,
        train_norms=options.train_norms,
    )
    take_over_(trainer, optimizer, [s.moved for s in switched], options.optimizer_state)
    take_layers_(options.averaged_models, model)
    scale_rates_(optimizer, scheduler, options.learning_rate_factor)
    error = fmean(each.error for each in switched)
    return f"{plan.summary()}; mean relative error of the weights {error:.3f}"


def rebalance_layers_(
    trainer: Trainer, optimizer: torch.optim.Optimizer, options: SwitchOptions
) -> None:
    """Balance the factors of all layers."""
    changed = rebalance_(trainer.model)  # pyright: ignore[reportArgumentType]
    take_over_(trainer, optimizer, [c.moved for c in changed], options.rebalance_state)
    follow_(options.averaged_models, changed)
