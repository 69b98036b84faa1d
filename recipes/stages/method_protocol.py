"""The protocol of PEFT's method comparison, and the folders that its experiments are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME

from peft_svdinit.files import read_json
from peft_svdinit.training import fault_of_value, guess, refused_as

PARAMS_NAME = "training_params.json"


@dataclass(frozen=True)
class Protocol:
    """Training parameters by PEFT's names, with the defaults that it publishes.

    Those are of method_comparison/MetaMathQA/default_training_params.json, as its results of July
    2026 record them. What its runner can do and this one cannot is refused by name.
    """

    model_id: str = "meta-llama/Llama-3.2-3B"
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    compile: bool = False
    use_gc: bool = False
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1}
    )
    lr_scheduler: str | None = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: Mapping[str, Any] = field(
        default_factory=lambda: {"max_length": 800, "max_new_tokens": 300}
    )
    attn_implementation: str | None = None
    init_kv_cache_prefix: str | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_kind(entry.name, getattr(self, entry.name), str(entry.type))
        for name in ("compile", "use_amp", "init_kv_cache_prefix"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by this runner, only by PEFT's own")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.lr_scheduler not in (None, "cosine"):
            raise ValueError(f"lr_scheduler must be null or cosine, got {self.lr_scheduler!r}")
        if "{query}" not in self.query_template:
            raise ValueError(f"query_template must have {{query}}, got {self.query_template!r}")
        with refused_as("query_template must have no braces but those of {query}"):
            self.query_template.format(query="")
        if not set(self.generation_kwargs) <= {"max_length", "max_new_tokens"}:
            raise ValueError(
                "generation_kwargs may have max_length and max_new_tokens, for answers are greedy; "
                f"got {dict(self.generation_kwargs)}"
            )
        for name, value in self.generation_kwargs.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"generation_kwargs: {name} must be at least 1, got {value!r}")
        self._check_optimizer()
        if self.grad_norm_clip < 0:
            raise ValueError(f"grad_norm_clip must be at least 0, got {self.grad_norm_clip}")
        for name in ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _check_optimizer(self) -> None:
        kind, options = getattr(torch.optim, self.optimizer_type, None), self.optimizer_kwargs
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(
                f"optimizer_type must be an optimizer of torch.optim, got {self.optimizer_type!r}"
            )
        if not isinstance(options.get("lr"), int | float):
            raise ValueError(f"optimizer_kwargs must have lr, a number, got {dict(options)}")
        with refused_as(f"optimizer_kwargs: torch.optim.{self.optimizer_type} does not take them"):
            kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)  # pyright: ignore

    def updated(self, params: Mapping[str, Any], place: str) -> Protocol:
        """With some of the parameters replaced.

        Raises:
            ValueError: for an unknown one, or a value that cannot be, beginning with `place`.
        """
        known = [entry.name for entry in fields(self)]
        for name in params:
            if name not in known:
                raise ValueError(
                    f"{place}: unknown training parameter {name!r}{guess(name, known)}"
                )
            if fault := fault_of_value(params[name]):
                raise ValueError(f"{place}: {name} {fault}")
        try:
            updated = replace(self, **params)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not updated.optimizer_kwargs["lr"] > 0:
            raise ValueError(f"{place}: the lr of optimizer_kwargs must be above 0")
        return updated

    def at_rate(self, factor: float) -> Protocol:
        """With `factor` times the learning rate."""
        rate = factor * self.optimizer_kwargs["lr"]
        return replace(self, optimizer_kwargs={**self.optimizer_kwargs, "lr": rate})


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Mapping[str, Any]": (Mapping,),
}


def _check_kind(name: str, value: Any, annotation: str) -> None:
    kind, _, rest = annotation.partition(" | ")
    if value is None and rest:
        return
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name} must be of type {annotation}, got {value!r}")


@dataclass(frozen=True)
class Experiment:
    """A folder `<method>/<name>` with `adapter_config.json` and, perhaps, `training_params.json`.

    Attributes:
        steps_before: optimizer steps that a training has besides `max_steps`, for the row of equal
            total budget.
    """

    name: str
    config: LoraConfig
    protocol: Protocol
    steps_before: int = 0

    @property
    def steps(self) -> int:
        return self.protocol.max_steps + self.steps_before

    @property
    def rate(self) -> float:
        return self.protocol.optimizer_kwargs["lr"]


def read_experiment(root: Path, name: str, defaults: Protocol) -> Experiment:
    """The experiment `<method>/<name>` below `root`, its parameters over `defaults`.

    Raises:
        ValueError: if there is none, it is no LoRA, or has parameters that PEFT's does not have.
    """
    folder = root / name
    if not (folder / CONFIG_NAME).is_file():
        known = sorted(
            str(path.parent.relative_to(root)) for path in root.glob(f"*/*/{CONFIG_NAME}")
        )
        raise ValueError(
            f"experiments: {folder} has no {CONFIG_NAME}; known ones of {root}: "
            f"{', '.join(known) or 'none'}{guess(name, known)}"
        )
    with refused_as(f"experiments: PEFT cannot read {folder / CONFIG_NAME}"):
        config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(
            f"experiments: {name} is a {type(config).__name__}; only LoRA's starts are compared "
            "here, and PEFT's own runner takes the others"
        )
    params = folder / PARAMS_NAME
    given = read_json(params, "experiments") if params.is_file() else {}
    return Experiment(name, config, defaults.updated(given, str(params)))
