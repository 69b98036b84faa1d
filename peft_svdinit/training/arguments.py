"""TrainingArguments with the defaults of our recipes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from .argument_checks import check_parts, check_values, mappings_refused
from .deepspeed_ops import COMMUNICATION, CPU_ADAM, prepare_op
from .running import WRAPPERS

_LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"


@dataclass
class RecipeArguments(TrainingArguments):
    """How to train: all of transformers' TrainingArguments, some with other defaults."""

    _argument_group_name = "training"
    _known_as: ClassVar = {"hub_model_id": ["repo_id"], "hub_base_model": ["base_model"]}

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
    total_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples per optimizer step over all processes and accumulated batches; "
            "per_device_train_batch_size follows from it."
        },
    )
    expected_processes: int | None = field(
        default=None,
        metadata={
            "help": "Refuse to run with another number of processes: launchers can silently start "
            "one where two were asked for."
        },
    )
    expected_wrapper: str | None = field(
        default=None,
        metadata={"help": f"Refuse to train within another class: {', '.join(WRAPPERS)}."},
    )
    expected_stage: int | None = field(
        default=None,
        metadata={
            "help": "Refuse to train at another stage of sharding: 0 to 3, as ZeRO counts them."
        },
    )

    hub_base_model: str | None = field(
        default=None,
        metadata={
            "help": "For push_to_hub: the base model's id on the Hub, where model_name_or_path is "
            "a path."
        },
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When to push: at the end, the one that recipes have."}
    )
    invocation: str | None = field(default=None, init=False)
    """The command of this run, as `parse_options` has it."""

    def __post_init__(self) -> None:
        self._check_hub()
        check_values(self)
        # Pinning without an accelerator only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._check_expectations()
        launched = _launched_with("DEEPSPEED")
        total = self.total_train_batch_size
        if total is not None:
            self._divide_batch(total, alone=bool(self.deepspeed or launched))
        if self.deepspeed or launched:
            self._prepare_deepspeed(launched)
        with mappings_refused(self):
            super().__post_init__()
        check_parts(self)
        if self.deepspeed_plugin is not None:
            self._check_deepspeed()
        if self.expected_processes not in (None, self.world_size):
            raise ValueError(
                f"expected_processes is {self.expected_processes}, but {self.world_size} run; "
                "`accelerate launch --cpu` starts one whatever is asked: use torchrun "
                "--nproc_per_node 2 recipe.py --use_cpu true"
            )
        step = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        if total not in (None, step):
            raise ValueError(
                f"total_train_batch_size={total}, but {self.world_size} processes with "
                f"{self.train_batch_size} examples each would take {step} a step; set "
                "per_device_train_batch_size instead"
            )

    @property
    def splits_state(self) -> bool:
        """Whether optimizer, gradients or weights are split among processes: DeepSpeed or FSDP."""
        return self.deepspeed_plugin is not None or bool(self.fsdp) or _launched_with("FSDP")

    @property
    def _zero(self) -> dict[str, Any]:
        plugin: Any = self.deepspeed_plugin
        return {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether DeepSpeed keeps the optimizer's state, or the weights, off the device."""
        return (self._zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def _prepare_deepspeed(self, launched: bool) -> None:
        """What DeepSpeed needs before the processes meet."""
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if launched and not (self.bf16 or self.fp16):
            # The Trainer takes the precision of a launch file everywhere but here.
            precision = os.environ.get(_LAUNCHED_PRECISION)
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        prepare_op(COMMUNICATION)

    def _check_deepspeed(self) -> None:
        import deepspeed.comm as communication  # pyright: ignore[reportMissingImports]

        if not communication.is_initialized() and self.world_size > 1:
            # Else models that are loaded in shards take the processes for one.
            communication.init_distributed("gloo" if self.use_cpu else None, verbose=False)
        if self.offloads("optimizer"):
            prepare_op(CPU_ADAM)
        gathers = self._zero.get("stage3_gather_16bit_weights_on_model_save")
        if self._zero.get("stage") == 3 and not gathers:
            raise ValueError(
                "deepspeed: ZeRO-3 saves a model only in shards that nothing else loads; set "
                "zero3_save_16bit_model to true in a file for accelerate, or "
                "stage3_gather_16bit_weights_on_model_save in DeepSpeed's own"
            )

    def _check_hub(self) -> None:
        if self.hub_token is not None:
            # TrainingArguments are pickled beside every checkpoint, and a command line is public.
            raise ValueError(
                "hub_token would be saved with the run and shown among the machine's processes; "
                "set HF_TOKEN, or run `hf auth login`"
            )
        if self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy must be end, got {self.hub_strategy!r}: recipes push what is whole, "
                "once; `svdinit push` pushes a checkpoint"
            )

    def _check_expectations(self) -> None:
        if self.expected_wrapper not in (None, *WRAPPERS):
            raise ValueError(
                f"expected_wrapper must be one of {', '.join(WRAPPERS)}, got "
                f"{self.expected_wrapper!r}"
            )
        if self.expected_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"expected_stage must be in 0..3, got {self.expected_stage}")

    def _divide_batch(self, total: int, *, alone: bool) -> None:
        """Before transformers writes the batch of a device into DeepSpeed's configuration.

        A process that was launched `alone`, or among others, has one device; any other has all.
        """
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        one = alone or "LOCAL_RANK" in os.environ or self.use_cpu
        devices = processes if one else max(torch.cuda.device_count(), 1)
        parts = devices * self.gradient_accumulation_steps
        if total < 1 or total % parts:
            raise ValueError(
                f"total_train_batch_size={total} cannot be divided among {devices} processes or "
                f"devices that accumulate {self.gradient_accumulation_steps} batches; use a "
                f"multiple of {parts}"
            )
        self.per_device_train_batch_size = total // parts


def _launched_with(what: str) -> bool:
    """Whether `accelerate launch` was told to use DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"
