"""What TrainingArguments take without a word, and a training stumbles over when it is under way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from .names import check_name
from .output_path import check_output
from .refusal import refused_as
from .seeds import check_seed

_BOUNDS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "eval_accumulation_steps", "dataloader_prefetch_factor",
            "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout",
        ),
    ),
    "above 0": (
        lambda value: value > 0,
        ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"),
    ),
    "at least 0": (
        lambda value: value >= 0,
        (
            "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay",
            "neftune_noise_alpha", "dataloader_num_workers",
        ),
    ),
    "in [0, 1)": (
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"),
    ),
}  # fmt: skip
_MAPPINGS = (
    "lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"
)  # fmt: skip
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
_TOKENS_SEEN = ("no", "all", "non_padding")
_METRICS = ("loss", "eval_loss")
# These are made of the model, whose layers they need.
_OF_A_MODEL = ("galore", "apollo", "lomo", "adalomo")


def check_values(arguments: TrainingArguments) -> None:
    """Refuse what no training can have, before transformers reads it.

    Raises:
        ValueError: naming the argument.
    """
    if arguments.output_dir is not None:
        check_output(arguments.output_dir)
    for rule, (holds, names) in _BOUNDS.items():
        for name in names:
            value: Any = getattr(arguments, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value}")
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise ValueError(
            f"max_steps must be at least 1, or -1 for num_train_epochs, got {arguments.max_steps}"
        )
    check_seed("seed", arguments.seed)
    if arguments.data_seed is not None:
        check_seed("data_seed", arguments.data_seed)
    seen: Any = arguments.include_num_input_tokens_seen
    if not isinstance(seen, bool):
        check_name("include_num_input_tokens_seen", seen, _TOKENS_SEEN)
    for name in (*_MAPPINGS, *_FILES):
        _check_mapping(name, getattr(arguments, name))
    _check_compilation(arguments)
    if arguments.label_names not in (None, ["labels"]):
        raise ValueError(
            f"label_names must be labels, which is what the examples have, got "
            f"{arguments.label_names}"
        )
    if arguments.metric_for_best_model not in (None, *_METRICS):
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join(_METRICS)}, which is all that an "
            f"evaluation measures here, got {arguments.metric_for_best_model!r}"
        )


def check_parts(arguments: TrainingArguments) -> None:
    """Make what is made of the arguments while a training begins, on one small weight.

    Raises:
        ValueError: naming the arguments.
    """
    with refused_as("report_to"):
        get_reporting_integration_callbacks(arguments.report_to)
    lacking = set(arguments.report_to or ()) - set(get_available_reporting_integrations())
    if lacking:
        raise ValueError(f"report_to: {', '.join(sorted(lacking))} is not installed here")
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if optim.startswith(_OF_A_MODEL) or arguments.deepspeed_plugin is not None:
        return
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with refused_as(f"optim={optim} and optim_args={arguments.optim_args!r}"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **options)
    name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    with refused_as(f"lr_scheduler_type={name} and lr_scheduler_kwargs"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(max(arguments.max_steps, 1)),
            num_training_steps=max(arguments.max_steps, 1),
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),  # pyright: ignore
        )


@contextmanager
def mappings_refused(arguments: TrainingArguments) -> Iterator[None]:
    """Within the context, what transformers cannot do with a mapping's entries is refused."""
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        given = [name for name in _FILES if getattr(arguments, name)]
        if not given:
            raise
        raise ValueError(f"{' or '.join(given)}: transformers cannot read it: {error}") from error


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    if value.startswith("{"):
        with refused_as(f"{name} must be JSON"):
            json.loads(value)
    elif name not in _FILES:
        raise ValueError(
            f"{name} must be a mapping in a file of options, or JSON such as "
            f"'{{\"name\": 1}}', got {value!r}"
        )
    elif not os.path.isfile(value):
        raise ValueError(f"{name} must be JSON or the path of a file, there is none at {value!r}")


def _check_compilation(arguments: TrainingArguments) -> None:
    backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
    if backend is not None:
        known = [each.value.lower() for each in DynamoBackend]
        check_name("torch_compile_backend", backend.lower(), known)
    if mode is not None:
        check_name("torch_compile_mode", mode, list(torch._inductor.list_mode_options()))
