"""A callback that switches layers to low rank while the Trainer goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    RowNormalise,
    check_rule,
    factorize_,
    low_rank_layers,
    make_plan,
    plan_to_shrink,
    rebalance_,
    shrink_,
    stable_ranks,
)
from peft_svdinit.optim import STATE_HANDLINGS, StateHandling
from trainer_callbacks.averaged_models import follow_, take_layers_
from trainer_callbacks.learning_rates import dampen_rates_, scale_rates_
from trainer_callbacks.low_rank_checkpoints import follow_checkpoints_
from trainer_callbacks.owning_trainer import trainer_of
from trainer_callbacks.plain_optimizer import plain
from trainer_callbacks.rank_schedule import (
    AtEpoch,
    AtStep,
    Seen,
    StableRankPlateau,
    Trigger,
    When,
    described,
    rewarmup,
)
from trainer_callbacks.rank_switch_checks import check_followers, check_processes
from trainer_callbacks.rank_switch_memory import Memory
from trainer_callbacks.reducer import check_equal
from trainer_callbacks.taking_over import take_over_

logger = logging.getLogger(__name__)


class RankSwitchCallback(TrainerCallback):
    """Train at full rank first, then go on with layers of low rank: same Trainer, same optimizer.

    At the end of the step in which the trigger is due, before that step is logged, evaluated and
    saved, the layers of the rule become `LowRankLinear`s; the optimizer gets the factors in the
    place of the weights, in the groups and the order in which a resumed run would build them; DDP
    gets a new reducer. A resumed run is bit-equal to one that was not interrupted.

    Checkpoints are dense ones that anybody loads, with the factors beside them, and the Trainer
    that has this callback restores those, to resume and of the best model.

    Args:
        rule: which layers, which ranks; or a plan that was made before.
        switch: when: an `AtStep`, `AtEpoch`, `LossPlateau`, `StableRankPlateau`, or a function of
            what was `Seen`.
        lowrank_switch_epoch: in its place, the number of epochs at full rank; 0 starts low.
        shrink: lower ranks later: pairs of when and rule, in their order.
        learning_rate_factor: of all rates after the switch.
        rewarmup_steps: steps over which the rate rises again after the switch.
        optimizer_state: "project" carries the moments of a weight over to its factors, "drop"
            begins anew. For Adam and SGD of torch; other optimizers need "drop".
        rebalance_steps: after so many steps, ever again, bring the factors of each product to equal
            size (arXiv:2505.22922).
        rebalance_state: what becomes of the moments then, likewise.
        batches: with them layers are approximated in what they compute, see `factorize_`; the same
            ones on all processes.
        row_normalise, train_norms: as `factorize_` has them.
        averaged_models: running averages of the model's parameters, `AveragedModel`s say, whose
            layers are switched along. They begin anew in these layers, and go on exactly when
            factors are rebalanced. Averages made by other callbacks are not seen.

    Raises:
        ValueError: for wrong options, here. Where training begins: for a rule or plan that fits no
            layer of the model, a model of low rank already, an optimizer or scheduler that cannot
            follow, a resumed checkpoint of other switches; under FSDP, ZeRO or tensor parallelism.
        TypeError: where training begins, for an optimizer whose state cannot be carried, or a model
            that is no PreTrainedModel.
        FileNotFoundError: when a checkpoint is loaded that lacks the plan of its switch.
        RuntimeError: where processes hold different parameters after a switch.
    """

    def __init__(
        self,
        rule: LowRankRule | LowRankPlan,
        switch: Trigger | Callable[[Seen], bool] | None = None,
        *,
        lowrank_switch_epoch: float | None = None,
        shrink: Sequence[tuple[Trigger | Callable[[Seen], bool], LowRankRule]] = (),
        learning_rate_factor: float = 0.5,
        rewarmup_steps: int = 0,
        optimizer_state: StateHandling = "project",
        rebalance_steps: int | None = None,
        rebalance_state: StateHandling = "project",
        batches: Iterable[Mapping[str, Any]] | None = None,
        row_normalise: RowNormalise = "none",
        train_norms: bool = False,
        averaged_models: Sequence[nn.Module] = (),
    ) -> None:
        if (switch is None) == (lowrank_switch_epoch is None):
            raise ValueError("give one of switch and lowrank_switch_epoch: when to switch")
        if not 0 < learning_rate_factor <= 1:
            raise ValueError(f"learning_rate_factor must be in (0, 1], got {learning_rate_factor}")
        for name, value in (
            ("rewarmup_steps", rewarmup_steps),
            ("rebalance_steps", rebalance_steps),
        ):
            if value is not None and value < (1 if name == "rebalance_steps" else 0):
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in (
            ("optimizer_state", optimizer_state),
            ("rebalance_state", rebalance_state),
        ):
            if value not in STATE_HANDLINGS:
                raise ValueError(
                    f"{name} must be one of {', '.join(STATE_HANDLINGS)}, got {value!r}"
                )
        if train_norms and (rebalance_steps or shrink) and rebalance_state != "drop":
            raise ValueError(
                "the moments of factors with train_norms cannot be carried to other factors; use "
                "rebalance_state=drop"
            )
        if isinstance(rule, LowRankPlan) and not rule.layers:
            raise ValueError("the plan names no layer")
        first = AtEpoch(lowrank_switch_epoch) if lowrank_switch_epoch is not None else switch
        assert first is not None
        self._stages: list[tuple[Trigger, LowRankRule | LowRankPlan]] = [
            (when if hasattr(when, "due") else When(when), each)  # pyright: ignore
            for when, each in [(first, rule), *shrink]
        ]
        self.learning_rate_factor = learning_rate_factor
        self.rewarmup_steps = rewarmup_steps
        self.optimizer_state: StateHandling = optimizer_state
        self.rebalance_steps = rebalance_steps
        self.rebalance_state: StateHandling = rebalance_state
        self.batches = None if batches is None else list(batches)
        self.row_normalise: RowNormalise = row_normalise
        self.train_norms = train_norms
        self.averaged_models = tuple(averaged_models)
        self._memory = Memory([[described(when), rule.as_dict()] for when, rule in self._stages])
        self._unchecked = False
        self._given_up: str | None = None
        self._trainer: Callable[[], Trainer | None] = lambda: None

    @property
    def switches(self) -> list[dict[str, Any]]:
        """Of each switch so far its step, the seconds that it took, which are in no step's time,
        and the parameters of its layers before and after."""
        return self._memory.done

    @property
    def switched_at(self) -> list[int]:
        """The steps of the switches so far."""
        return [each["step"] for each in self.switches]

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer() or self._attach()
        model, optimizer = kwargs["model"], plain(kwargs["optimizer"])
        lowers = self.rebalance_steps is not None or len(self._stages) > 1
        check_followers(
            trainer,
            model,
            optimizer,
            kwargs["lr_scheduler"],
            carries=self.optimizer_state == "project"
            or (lowers and self.rebalance_state == "project"),
            factor=self.learning_rate_factor,
            rewarmup_steps=self.rewarmup_steps,
            averaged=self.averaged_models,
        )
        self._given_up = None
        self._memory.recall(state)
        self._check_stage(model)
        self._memory.keep(state)
        if not state.global_step:
            self._switch_if_due(state, trainer, model, optimizer, kwargs["lr_scheduler"])
            self._rewarm(state, optimizer, kwargs["lr_scheduler"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer()
        assert trainer is not None
        model, optimizer = kwargs["model"], plain(kwargs["optimizer"])
        scheduler = kwargs["lr_scheduler"]
        if self._unchecked and dist.is_initialized():
            check_equal(dict(model.named_parameters()), "parameters a step after the switch")
        self._unchecked = False
        self._look(state, model)
        since = state.global_step - self.switched_at[0] if self.switched_at else 0
        changed = self._switch_if_due(state, trainer, model, optimizer, scheduler)
        if self.rebalance_steps and since and since % self.rebalance_steps == 0 and not changed:
            self._rebalance(trainer, model, optimizer)
        self._rewarm(state, optimizer, scheduler)
        self._memory.keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        missed = self._stages[len(self.switched_at) :]
        if missed and state.is_world_process_zero:
            what = "stayed dense" if not self.switched_at else "kept its ranks"
            why = self._given_up or f"{described(missed[0][0])} was never due"
            logger.warning("the training ended and the model %s: %s", what, why)

    def _attach(self) -> Trainer:
        trainer = trainer_of(self)
        check_processes(trainer)
        self._trainer = ref(trainer)
        follow_checkpoints_(trainer, lambda model: take_layers_(self.averaged_models, model))
        return trainer

    def _check_stage(self, model: nn.Module) -> None:
        """Refuse a model that is not in the state in which the switches so far left it."""
        low = low_rank_layers(model)
        if low and not self.switched_at:
            raise ValueError(
                f"the model is of low rank already ({next(iter(low))} and {len(low) - 1} other "
                "layers), and nothing is left to switch; train it without this callback"
            )
        if self.switched_at and not low:
            raise ValueError(
                "the checkpoint was saved after a switch to low rank, but the model is dense: pass "
                "the callback when the Trainer is made, in callbacks=[...]"
            )
        first = self._stages[0][1]
        if not self.switched_at:
            # What would fail at the switch is better known now.
            if isinstance(first, LowRankPlan):
                first.check(model)
            else:
                check_rule(model, first)

    def _look(self, state: TrainerState, model: nn.Module) -> None:
        """Take the stable ranks at the end of an epoch, if a trigger wants them."""
        wanted = any(isinstance(when, StableRankPlateau) for when, _ in self._stages)
        epochs = int((state.epoch or 0) + 1e-9)
        rule = self._stages[0][1]
        if not wanted or self.switched_at or epochs <= len(self._memory.stable_ranks):
            return
        assert isinstance(rule, LowRankRule)
        self._memory.stable_ranks.append(stable_ranks(model, rule))

    def _switch_if_due(
        self,
        state: TrainerState,
        trainer: Trainer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> bool:
        stage = len(self.switched_at)
        if self._given_up or stage == len(self._stages):
            return False
        when, rule = self._stages[stage]
        if not self._is_due(state, when):
            return False
        began = time.perf_counter()
        try:
            found = self._planned(model, rule)
        except ValueError as error:
            # Weights have come to be such that the rule fits none: no reason to lose the training.
            self._given_up = f"at step {state.global_step} {error}"
            logger.warning("nothing is switched: %s", self._given_up)
            return False
        [plan] = broadcast_object_list([found])  # The first process decides.
        if stage:
            changed = shrink_(model, plan)
            take_over_(trainer, optimizer, [c.moved for c in changed], self.rebalance_state)
            follow_(self.averaged_models, changed)
            outcome = plan.summary()
        else:
            switched = factorize_(
                model,
                plan,
                batches=self.batches,
                row_normalise=self.row_normalise,
                train_norms=self.train_norms,
            )
            take_over_(trainer, optimizer, [s.moved for s in switched], self.optimizer_state)
            take_layers_(self.averaged_models, model)
            scale_rates_(optimizer, scheduler, self.learning_rate_factor)
            error = fmean(each.error for each in switched)
            outcome = f"{plan.summary()}; mean relative error of the weights {error:.3f}"
        self._unchecked = True
        self.switches.append(
            {
                "step": state.global_step,
                "seconds": round(time.perf_counter() - began, 3),
                "dense_parameters": plan.dense_parameters,
                "parameters": plan.parameters,
            }
        )
        if state.is_world_process_zero:
            taken = self.switches[-1]["seconds"]
            logger.info("switched at step %d in %.1f s: %s", state.global_step, taken, outcome)
        return True

    def _planned(self, model: nn.Module, rule: LowRankRule | LowRankPlan) -> LowRankPlan:
        if isinstance(rule, LowRankPlan):
            return rule
        return plan_to_shrink(model, rule) if self.switched_at else make_plan(model, rule)

    def _is_due(self, state: TrainerState, when: Trigger) -> bool:
        if isinstance(when, (AtStep, AtEpoch)):
            return when.due(Seen(state.global_step, state.epoch or 0.0))
        logs, epoch = state.log_history, state.epoch or 0.0
        due = when.due(Seen(state.global_step, epoch, logs, self._memory.stable_ranks))
        return bool(broadcast_object_list([due])[0])

    def _rewarm(
        self, state: TrainerState, optimizer: torch.optim.Optimizer, scheduler: Any
    ) -> None:
        if not self.switched_at:
            return
        share = rewarmup(state.global_step - self.switched_at[0], self.rewarmup_steps)
        if share < 1:
            dampen_rates_(optimizer, scheduler, share)

    def _rebalance(
        self, trainer: Trainer, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        changed = rebalance_(model)
        take_over_(trainer, optimizer, [c.moved for c in changed], self.rebalance_state)
        follow_(self.averaged_models, changed)
