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
    model: nn.Module, rule: LowRankRule | LowRankPlan, *, first: bool
) -> tuple[LowRankPlan | None, str]:
    """The plan that the first process makes, or why the weights allow none.

    All processes take part, and whatever fails in the first one is said in all.

    Args:
        model: the model.
        rule: of the switch, if it is the `first` stage, or of lower ranks.

    Raises:
        RuntimeError: if planning fails for another reason than what the weights are.
    """
    found: tuple[LowRankPlan | None, str, bool] = (None, "", False)
    if PartialState().is_main_process:
        try:
            if isinstance(rule, LowRankPlan):
                found = rule, "", False
            else:
                found = (make_plan if first else plan_to_shrink)(model, rule), "", False
        except ValueError as error:
            found = None, str(error), False
        except Exception as error:  # In one process alone it would leave the others waiting.
            found = None, f"{type(error).__name__}: {error}", True
    [(plan, reason, failed)] = broadcast_object_list([found])
    if failed:
        raise RuntimeError(f"the ranks of a switch could not be chosen: {reason}")
    return plan, reason


def _parameters_in(model: nn.Module, plan: LowRankPlan) -> int:
    """Entries of the planned layers' weights or factors, as they are."""
    low = low_rank_layers(model)
    if not low:
        return plan.dense_parameters
    return sum(low[name].rank * sum(layer.shape) for name, layer in plan.layers.items())


def apply_plan_(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    plan: LowRankPlan,
    options: SwitchOptions,
) -> tuple[int, str]:
    """Switch the layers of the plan, or lower their ranks.

    Returns:
        The parameters that the layers had, and what was done, in words.
    """
    model: nn.Module = trainer.model  # pyright: ignore[reportAssignmentType]
    before = _parameters_in(model, plan)
    if low_rank_layers(model):
        changed = shrink_(model, plan)
        take_over_(trainer, optimizer, [c.moved for c in changed], options.optimizer_state)
        follow_(options.averaged_models, changed)
        after = f"{plan.parameters:,}"
        return before, f"{len(changed)} layers at lower ranks: {before:,} weights become {after}"
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
    return before, f"{plan.summary()}; mean relative error of the weights {error:.3f}"


def rebalance_layers_(
    trainer: Trainer, optimizer: torch.optim.Optimizer, options: SwitchOptions
) -> None:
    """Balance the factors of all layers."""
    changed = rebalance_(trainer.model)  # pyright: ignore[reportArgumentType]
    take_over_(trainer, optimizer, [c.moved for c in changed], options.rebalance_state)
    follow_(options.averaged_models, changed)
