"""TrainingArguments with the defaults of our recipes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class RecipeArguments(TrainingArguments):
    """How to train: all of transformers' TrainingArguments, some with other defaults."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default="runs/default", metadata={"help": "Folder of checkpoints, logs and the result."}
    )
    max_steps: int = field(default=100, metadata={"help": "Optimizer steps of the run."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Examples per device and step."}
    )
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "Examples per device in an evaluation."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=2, metadata={"help": "Steps (below 1: share of the steps) of linear warm-up."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Log every so many steps (below 1: share of the steps)."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(
        default=0.25, metadata={"help": "Evaluate every so many steps (below 1: share of them)."}
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(
        default=200, metadata={"help": "Checkpoint every so many steps (below 1: share of them)."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Which tokens the run counts."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Keep no logits of evaluations, only the loss."}
    )
    report_to: str = field(
        default="none", metadata={"help": "Integrations to report to, such as tensorboard."}
    )
    expected_processes: int | None = field(
        default=None,
        metadata={
            "help": "Refuse to run with another number of processes: launchers can silently start "
            "one where two were asked for."
        },
    )

    def __post_init__(self) -> None:
        # Pinning without an accelerator only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        if self.expected_processes not in (None, self.world_size):
            raise ValueError(
                f"expected_processes is {self.expected_processes}, but {self.world_size} run; "
                "`accelerate launch --cpu` starts one whatever is asked: use torchrun "
                "--nproc_per_node, or accelerate launch --multi_gpu --num_processes with --use_cpu"
            )
