"""A callback that switches layers to low rank while the Trainer goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    RowNormalise,
    save_dense_,
    stable_ranks,
)
from peft_svdinit.optim import StateHandling
from trainer_callbacks.agreement import check_equal
from trainer_callbacks.averaged_models import drop_layers_, take_layers_
from trainer_callbacks.layer_switching import (
    agreed_plan,
    apply_plan_,
    rebalance_layers_,
)
from trainer_callbacks.learning_rates import dampen_rates_, scale_rates_
from trainer_callbacks.low_rank_checkpoints import files_of_factors, follow_checkpoints_
from trainer_callbacks.owning_trainer import trainer_of
from trainer_callbacks.plain_optimizer import plain
from trainer_callbacks.rank_schedule import (
    AtEpoch,
    AtStep,
    Seen,
    StableRankPlateau,
    Trigger,
    as_trigger,
    described,
    rewarmup,
)
from trainer_callbacks.rank_switch_checks import check_followers, check_model, check_processes
from trainer_callbacks.rank_switch_memory import Memory, was_switched
from trainer_callbacks.rank_switch_options import SwitchOptions
from trainer_callbacks.taking_over import groups_digest

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
        shrink: lower ranks later: pairs of when and rule, in their order. A plateau is one since
            the switch before it.
        learning_rate_factor: of all rates after the switch.
        rewarmup_steps: steps over which the rate rises again after the switch.
        optimizer_state: "project" carries the moments of a weight over to its factors, and on to
            those of a lower rank; "drop" begins anew. For Adam (without amsgrad) and SGD of torch;
            other optimizers need "drop".
        rebalance_steps: after so many steps, ever again, bring the factors of each product to equal
            size (arXiv:2505.22922).
        rebalance_state: what becomes of the moments then, likewise.
        batches: with them layers are approximated in what they compute, see `factorize_`; the same
            ones on all processes.
        row_normalise, train_norms: as `factorize_` has them.
        averaged_models: running averages of the model's parameters, `AveragedModel`s say, whose
            layers are switched along. They begin anew in these layers, and go on exactly when
            factors are rebalanced. Averages made by other callbacks are not seen.

    A run that is resumed must be given all of this as it was.

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
        first = AtEpoch(lowrank_switch_epoch) if lowrank_switch_epoch is not None else switch
        later = [(as_trigger(when, "shrink"), each) for when, each in shrink]
        self.options = SwitchOptions(
            stages=[(as_trigger(first), rule), *later],
            learning_rate_factor=float(learning_rate_factor),
            rewarmup_steps=rewarmup_steps,
            optimizer_state=optimizer_state,
            rebalance_steps=rebalance_steps,
            rebalance_state=rebalance_state,
            batches=None if batches is None else list(batches),
            row_normalise=row_normalise,
            train_norms=train_norms,
            averaged_models=tuple(averaged_models),
        )
        self._memory = Memory(self.options.as_dict())
        self._unchecked = False
        self._resumed_from: str | None = None
        self._trainer: Callable[[], Trainer | None] = lambda: None
        # The optimizer whose rates are lowered: the Trainer keeps it for a training after this.
        self._lowered: Callable[[], torch.optim.Optimizer | None] = lambda: None

    @property
    def switches(self) -> list[dict[str, Any]]:
        """Of each switch so far its step, the seconds that it took, which are in no step's time,
        and the parameters of its layers before and after."""
        return [each for each in self._memory.done if "reason" not in each]

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
        scheduler = kwargs["lr_scheduler"]
        check_followers(trainer, model, optimizer, scheduler, self.options)
        self._memory.recall(state)
        check_model(model, optimizer, self.options, bool(self.switches))
        drop_layers_(self.options.averaged_models, model)
        # The Trainer loads either both of these or none.
        files = (OPTIMIZER_NAME, SCHEDULER_NAME)
        loaded = all(Path(self._resumed_from or "", name).is_file() for name in files)
        self._resumed_from = None
        if loaded and self._memory.groups not in ("", groups_digest(model, optimizer)):
            raise ValueError(
                "the optimizer holds its parameters in another order than when the checkpoint was "
                "saved, so that their state went to others; build its groups in the order of "
                "model.named_parameters(), as the Trainer does"
            )
        # From now on, for what an earlier run left beside checkpoints of the same names.
        save_dense_(model)
        factor = self.options.learning_rate_factor
        if not loaded and self._lowered() is optimizer:
            scale_rates_(optimizer, scheduler, 1 / factor)  # What an earlier training left.
        if not loaded and self.switches:
            scale_rates_(optimizer, scheduler, factor)
        self._lowered = ref(optimizer) if self.switches else lambda: None
        if not state.global_step:
            self._switch_if_due(state, trainer, model, optimizer, scheduler)
        if not loaded:
            self._rewarm(state, trainer, optimizer, scheduler)
        self._memory.keep(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer()
        assert trainer is not None
        model, optimizer = kwargs["model"], plain(kwargs["optimizer"])
        scheduler = kwargs["lr_scheduler"]
        if self._unchecked and dist.is_initialized():
            what = "parameters a step after the switch, whose gradients are not reduced together"
            check_equal(dict(model.named_parameters()), what)
        self._unchecked = False
        self._look(state, model)
        since = state.global_step - self.switched_at[0] if self.switches else 0
        changed = self._switch_if_due(state, trainer, model, optimizer, scheduler)
        every = self.options.rebalance_steps
        if every and since and since % every == 0 and not changed:
            rebalance_layers_(trainer, optimizer, self.options)
        self._rewarm(state, trainer, optimizer, scheduler)
        self._memory.keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        done, stages = self._memory.done, self.options.stages
        missed = [f"{each['reason']}, at step {each['step']}" for each in done if "reason" in each]
        if len(done) < len(stages):
            missed.append(f"{described(stages[len(done)][0])} was never due")
        what = "kept its ranks" if self.switches else "stayed dense"
        for why in missed:
            logger.warning("the training ended and the model %s: %s", what, why)

    def needs_of(self, checkpoint: Path) -> list[str]:
        """The files of a checkpoint that a resumed run reads."""
        return files_of_factors(checkpoint) if was_switched(checkpoint) else []

    def _attach(self) -> Trainer:
        trainer = trainer_of(self)
        check_processes(trainer)
        self._trainer = ref(trainer)
        follow_checkpoints_(trainer, self._follow_resume)
        return trainer

    def _follow_resume(self, model: nn.Module, path: str) -> None:
        self._resumed_from = path
        take_layers_(self.options.averaged_models, model)

    def _look(self, state: TrainerState, model: nn.Module) -> None:
        """Take the stable ranks at the end of an epoch, if the next trigger wants them."""
        epoch = int((state.epoch or 0) + 1e-9)
        waiting = self.options.stages[len(self._memory.done) :]
        if not waiting or epoch <= self._memory.epoch:
            return
        when, rule = waiting[0]
        if isinstance(when, StableRankPlateau) and isinstance(rule, LowRankRule):
            self._memory.epoch = epoch
            self._memory.stable_ranks.append(stable_ranks(model, rule))

    def _switch_if_due(
        self,
        state: TrainerState,
        trainer: Trainer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> bool:
        waiting = self.options.stages[len(self._memory.done) :]
        if not waiting or not self._is_due(state, waiting[0][0]):
            return False
        began = time.perf_counter()
        first = not self._memory.done
        plan, reason = agreed_plan(model, waiting[0][1], first=first)
        done: dict[str, Any] = {"step": state.global_step}
        if plan is None:
            # Weights have come to be such that the rule fits none: no reason to lose the training.
            done["reason"] = reason
            said = f"nothing is switched at step {state.global_step}: {reason}"
        else:
            before, outcome = apply_plan_(trainer, optimizer, scheduler, plan, self.options)
            self._lowered = ref(optimizer)
            done["seconds"] = round(time.perf_counter() - began, 3)
            done["parameters_before"] = before
            done["parameters"] = plan.parameters
            said = f"switched at step {state.global_step} in {done['seconds']:.1f} s: {outcome}"
            self._unchecked = True
            self._memory.groups = groups_digest(model, optimizer)
        self._memory.done.append(done)
        self._memory.epoch = int((state.epoch or 0) + 1e-9)
        self._memory.stable_ranks = []
        if state.is_world_process_zero:
            logger.log(logging.WARNING if plan is None else logging.INFO, said)
        return plan is not None

    def _is_due(self, state: TrainerState, when: Trigger) -> bool:
        if isinstance(when, (AtStep, AtEpoch)):
            return when.due(Seen(state.global_step, state.epoch or 0.0))
        last = self._memory.done[-1]["step"] if self._memory.done else -1
        logs = [log for log in state.log_history if log.get("step", 0) > last]
        seen = Seen(state.global_step, state.epoch or 0.0, logs, self._memory.stable_ranks)
        return bool(broadcast_object_list([when.due(seen)])[0])

    def _rewarm(
        self,
        state: TrainerState,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> None:
        # Where the optimizer's step was skipped, the scheduler's was too: its rate is the last one.
        if not self.switches or trainer.accelerator.optimizer_step_was_skipped:
            return
        share = rewarmup(state.global_step - self.switched_at[0], self.options.rewarmup_steps)
        if share < 1:
            dampen_rates_(optimizer, scheduler, share)
