"""The options of `continual.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    check_names,
    check_seeds,
)
from stages.lora_options import LoraOptions
from stages.lori_options import SparseOptions
from stages.quiet_arguments import QuietArguments

TASKS = ("first", "second")
SCHEMES = ("lora", "lori", "lori_exclude", "shared")


@dataclass(frozen=True)
class ContinualOptions:
    """Two tasks, one after the other, and the schemes to learn them with."""

    _argument_group_name = "continual learning"

    first_dataset_name: str = field(
        default="builtin:stdlib-docstrings", metadata={"help": "Data set of task one."}
    )
    second_dataset_name: str = field(
        default="builtin:python-topics", metadata={"help": "Data set of task two."}
    )
    schemes: list[str] = field(
        default_factory=lambda: list(SCHEMES),
        metadata={
            "help": "lora: train on; lori: a sparse part of its own mask over the first; "
            "lori_exclude: of a mask apart from the first's; shared: one dense adapter of both "
            "tasks, a sparse part of each on top."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "One set of runs for each."}
    )
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "Of lora."})
    lori_learning_rate: float = field(default=3e-3, metadata={"help": "Of all sparse runs."})

    def __post_init__(self) -> None:
        check_names("schemes", self.schemes, SCHEMES)
        check_seeds("seeds", self.seeds)
        for name in ("lora_learning_rate", "lori_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.first_dataset_name == self.second_dataset_name:
            raise ValueError(
                "first_dataset_name and second_dataset_name must differ, both are "
                f"{self.first_dataset_name!r}"
            )


@dataclass(frozen=True)
class ContinualDataOptions(DataOptions):
    """Columns and split of both data sets."""

    max_eval_samples: int | None = field(
        default=64, metadata={"help": "evaluate on at most so many examples of each task"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name != DataOptions.dataset_name:
            raise ValueError(
                "dataset_name is one of two here; use first_dataset_name and second_dataset_name"
            )


@dataclass(frozen=True)
class _OneOfTwo(DataOptions):
    _for_several: ClassVar[bool] = True


@dataclass
class ContinualArguments(QuietArguments):
    """How to train each stage: all of transformers' TrainingArguments; `seeds` sets the seed."""

    output_dir: str | None = field(
        default="continual", metadata={"help": "Folder of all runs and of the report."}
    )
    max_steps: int = field(
        default=50, metadata={"help": "Optimizer steps of each stage, half of them on each part."}
    )


@dataclass(frozen=True)
class ContinualSetting:
    """All options of a run."""

    continual: ContinualOptions
    model: ModelOptions
    data: ContinualDataOptions
    sparse: SparseOptions
    arguments: ContinualArguments

    def __post_init__(self) -> None:
        # Not in the arguments, of which every run has a copy with its own.
        steps = self.arguments.max_steps
        if steps < 2 or steps % 2:
            raise ValueError(
                f"max_steps must be even and at least 2, got {steps}: shared takes half of them "
                "for the part of each task"
            )
        for name, remedy in (("seed", "seeds"), ("learning_rate", "a rate for each scheme")):
            if getattr(self.arguments, name) != getattr(RecipeArguments, name):
                raise ValueError(f"{name} is set for every run; use {remedy}")
        for name in ("load_best_model_at_end", "push_to_hub"):
            if getattr(self.arguments, name):
                raise ValueError(f"{name} is of no use here: every stage is kept as it ends")

    @property
    def root(self) -> Path:
        """Folder of the runs."""
        return Path(str(self.arguments.output_dir)) / "runs"

    @property
    def data_of(self) -> Mapping[str, DataOptions]:
        """The data set of each task."""
        options = self.continual
        names = (options.first_dataset_name, options.second_dataset_name)
        return {
            task: replace(_OneOfTwo(), **{**vars(self.data), "dataset_name": name})
            for task, name in zip(TASKS, names, strict=True)
        }

    @property
    def lora(self) -> LoraOptions:
        """The dense adapter of the same size."""
        return LoraOptions(
            lora_r=self.sparse.lora_r,
            lora_alpha=self.sparse.lora_alpha,
            lora_dropout=self.sparse.lora_dropout,
            lora_target_modules=self.sparse.lora_target_modules,
        )
