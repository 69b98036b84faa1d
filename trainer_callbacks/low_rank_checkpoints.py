"""A Trainer that gives its model the structure of the checkpoint that it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_svdinit.low_rank import (
    FACTORS_NAME,
    PLAN_NAME,
    densify_,
    is_low_rank,
    is_small_form,
    restore_layers_,
)
from peft_svdinit.optim import Moved
from trainer_callbacks.owning_trainer import trainer_of
from trainer_callbacks.plain_optimizer import plain
from trainer_callbacks.rank_switch_memory import was_switched
from trainer_callbacks.reducer import rebuild_reducer_
from trainer_callbacks.renamed_weights import load_renamed_
from trainer_callbacks.taking_over import replace_


def follow_checkpoints_(
    trainer: Trainer,
    resumed: Callable[[nn.Module, str], None] = lambda model, path: None,
    *,
    always_low: bool = False,
) -> None:
    """Make a Trainer's loading of checkpoints, to resume and of the best one, change structure.

    Weights are loaded into the model before an optimizer is made for it and before any hook is
    called, without strictness: dense weights beside factors would be taken in silence. So whatever
    the model is, it is made dense, given the checkpoint's dense weights, and then the very factors
    that lie beside them; checkpoints of the small form are loaded as they are. Weights that the
    checkpoint keeps under other names, which the Trainer would leave out, are loaded as
    `from_pretrained` does. FSDP and DeepSpeed load checkpoints of their own, of the structure that
    the model has, and are left alone.

    Args:
        trainer: the Trainer.
        resumed: called with the model and the path after a checkpoint to resume from was loaded.
        always_low: whether a checkpoint without low-rank layers is one whose plan is missing.

    Raises:
        ValueError: if another callback has done this.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if "_load_from_checkpoint" in vars(trainer):
        raise ValueError(
            "the Trainer has two callbacks that restore low-rank checkpoints; RankSwitchCallback "
            "does so by itself, leave LowRankCheckpointsCallback out"
        )

    def following(load: Callable[..., None], path: str, *arguments: Any) -> None:
        model: Any = trainer.model
        if is_small_form(path):
            load(*arguments)
            return
        if not is_low_rank(path) and (always_low or was_switched(path)):
            raise FileNotFoundError(
                f"checkpoint: {path} is of a model with low-rank layers, but has no {PLAN_NAME}; "
                "take another checkpoint"
            )
        _repair(trainer, densify_(model))
        load(*arguments)
        load_renamed_(model, path)
        _repair(trainer, restore_layers_(model, path) if is_low_rank(path) else [])

    resume, best = trainer._load_from_checkpoint, trainer._load_best_model

    def load_from_checkpoint(path: str, model: nn.Module | None = None) -> None:
        following(resume, path, path, model)
        resumed(trainer.model, path)  # pyright: ignore[reportArgumentType]

    def load_best_model() -> None:
        following(best, str(trainer.state.best_model_checkpoint))

    trainer._load_from_checkpoint = load_from_checkpoint  # pyright: ignore
    trainer._load_best_model = load_best_model


class LowRankCheckpointsCallback(TrainerCallback):
    """For a model that is of low rank before its Trainer is made: resume, and load the best model.

    Its checkpoints are dense with the factors beside them, which the Trainer by itself would not
    read. Give it in `callbacks=[...]` when the Trainer is made. `RankSwitchCallback` does the same.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        follow_checkpoints_(trainer_of(self), always_low=True)

    def needs_of(self, checkpoint: Path) -> list[str]:
        """The files of a checkpoint that a resumed run reads."""
        own = [*checkpoint.glob("pytorch_model_fsdp*"), *checkpoint.glob("global_step*")]
        return [] if own else files_of_factors(checkpoint)


def files_of_factors(checkpoint: Path) -> list[str]:
    """What stands beside the weights of a checkpoint of low rank."""
    return [] if is_small_form(checkpoint) else [PLAN_NAME, FACTORS_NAME]


def _repair(trainer: Trainer, moved: list[Moved]) -> None:
    """Let an optimizer that was made before, and DDP, see what is in the model now."""
    if not moved:
        return
    if trainer.optimizer is not None:
        replace_(trainer, plain(trainer.optimizer), moved, "drop")
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        rebuild_reducer_(trainer.model_wrapped)
