"""`--dry_run true`: what a training will need, printed before anything is loaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peft_svdinit.training import (
    DataOptions,
    MemoryEstimate,
    ModelOptions,
    RecipeArguments,
    enable_checkpointing_,
    estimate_memory,
    load_skeleton,
)
from stages.lora_options import LoraOptions
from stages.skeletons import adapted_skeleton

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DryRunOptions:
    """An estimate in place of a run."""

    _argument_group_name = "dry run"

    dry_run: bool = field(
        default=False,
        metadata={"help": "Only say what memory and disk the run needs; loads no weights."},
    )
    dry_run_devices: int | None = field(
        default=None,
        metadata={"help": "Devices of the estimate, one process each; by default those launched."},
    )
    dry_run_zero_stage: int | None = field(
        default=None,
        metadata={
            "help": "ZeRO's stage in the estimate, 0 for DDP to 3, also for FSDP's full shard; by "
            "default that of the DeepSpeed or FSDP launched."
        },
    )

    def __post_init__(self) -> None:
        if self.dry_run_devices is not None and self.dry_run_devices < 1:
            raise ValueError(f"dry_run_devices must be at least 1, got {self.dry_run_devices}")
        if self.dry_run_zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"dry_run_zero_stage must be in 0..3, got {self.dry_run_zero_stage}")


def memory_of(
    model: ModelOptions,
    data: DataOptions,
    lora: LoraOptions | None,
    arguments: RecipeArguments,
    options: DryRunOptions,
) -> MemoryEstimate:
    """The estimate of one training: of an adapter, or of all parameters without `lora`.

    Raises:
        ValueError: for a model or an optimizer of which none can be made.
    """
    if lora is None:
        skeleton: Any = load_skeleton(model)
    else:
        # A start changes values, not shapes, and its factors need not exist yet.
        skeleton = adapted_skeleton(model, lora)
        if lora.init == "svd" and lora.svd_start == "reference":
            initial = sum(
                weight.numel() for weight in skeleton.parameters() if weight.requires_grad
            )
            skeleton.register_buffer("reference", torch.empty(initial, device="meta"))
    if arguments.gradient_checkpointing:
        kwargs = arguments.gradient_checkpointing_kwargs
        enable_checkpointing_(skeleton, kwargs if isinstance(kwargs, dict) else None)
    cast = _cast(arguments)
    if cast is not None:
        skeleton.to(cast)  # pyright: ignore[reportArgumentType]
    evaluates = arguments.eval_strategy != "no" or arguments.eval_on_start
    stage = _zero_stage(options, arguments)
    found = estimate_memory(
        skeleton,
        batch_size=arguments.per_device_train_batch_size,
        length=data.max_length,
        optim=_optimizer(arguments),
        eval_batch_size=arguments.per_device_eval_batch_size if evaluates else None,
        autocast=None if cast else _AUTOCAST.get(arguments.mixed_precision),
        devices=options.dry_run_devices or arguments.world_size,
        zero_stage=stage,
    )
    if arguments.offloads("optimizer"):
        found = replace(found, optimizer=0, host=found.optimizer)
    if stage == 3 and arguments.offloads("param"):
        weights = found.frozen + found.trained
        found = replace(found, frozen=0, trained=0, host=found.host + weights)
    return found


def _cast(arguments: RecipeArguments) -> torch.dtype | None:
    """The type that DeepSpeed casts all weights to, in place of autocast."""
    if arguments.deepspeed_plugin is None:
        return None
    return _AUTOCAST.get(arguments.mixed_precision)


def _zero_stage(options: DryRunOptions, arguments: RecipeArguments) -> int:
    if options.dry_run_zero_stage is not None:
        return options.dry_run_zero_stage
    if arguments.deepspeed_plugin is not None:
        return arguments.deepspeed_plugin.zero_stage
    return 3 if arguments.splits_state else 0


def print_estimate(
    options: DryRunOptions,
    model: ModelOptions,
    data: DataOptions,
    lora: LoraOptions | None,
    arguments: RecipeArguments,
    *,
    runs: int = 1,
) -> None:
    """Print what each of `runs` trainings needs of a device and of the disk, on the main process.

    Raises:
        ValueError: as `memory_of`.
    """
    if not arguments.should_save:
        return
    found = memory_of(model, data, lora, arguments, options)
    quantised = model.load_in_4bit or model.load_in_8bit
    held = "4-bit" if model.load_in_4bit else "8-bit" if model.load_in_8bit else model.dtype
    mixed = arguments.mixed_precision
    cast = _cast(arguments) is not None
    if cast and not quantised:
        held = {"bf16": "bfloat16", "fp16": "float16"}[mixed]
    checkpointing = "with" if arguments.gradient_checkpointing or quantised else "without"
    tokens = f"{arguments.per_device_train_batch_size} x {data.max_length} tokens"
    rows = [
        ("frozen weights", found.frozen, held),
        ("trained weights", found.trained, f"{found.trained_parameters:,} parameters"),
        ("gradients", found.gradients, ""),
        ("optimizer state", found.optimizer, _optimizer(arguments)),
        ("gradient buckets", found.buckets, "of DDP"),
        ("a step", found.step, f"{tokens}, {checkpointing} gradient checkpointing"),
        (
            "an evaluation",
            found.evaluation,
            f"{arguments.per_device_eval_batch_size} x {data.max_length} tokens",
        ),
        ("in all", found.total, "at the larger of these two"),
        ("on the host", found.host, "offloaded by each device, in none of the rows above"),
    ]
    what = "all parameters" if lora is None else f"LoRA of rank {lora.lora_r}"
    autocast = "" if mixed == "no" or cast else f", autocast to {mixed}"
    print(f"{model.model_name_or_path}, {what}{autocast}: memory of each device")
    for name, size, note in rows:
        if size != 0:
            print(f"  {name:16} {_size(size):>10}  {note}".rstrip())
    print("  not counted: the device's context (0.5 to 1 GiB), kernels' workspaces, fragmentation")
    if runs > 1:
        print("  not counted: the first factors of reference starts, and the factors on the disk")
    print(
        f"Disk: {_size(found.saved)} for the result of a run, {runs} in all; "
        f"{_size(found.checkpoint)} for a checkpoint; "
        f"{_size(_free(Path(str(arguments.output_dir))))} free"
    )


def _optimizer(arguments: RecipeArguments) -> str:
    return str(getattr(arguments.optim, "value", arguments.optim))


def _free(folder: Path) -> int:
    folder = folder.resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.2f} KiB"
