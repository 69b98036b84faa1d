"""The options of `compare_inits.py`, and what of them its results depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_svdinit import __version__
from peft_svdinit.factors import Synthesis
from peft_svdinit.files import file_stamps
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    check_different,
    check_name,
    check_names,
    check_seeds,
    resolve_model,
)
from stages.lora_options import LoraOptions
from stages.starts import CELLS

# Options of the training arguments that say where and how loudly, not what is computed.
_NOT_INPUTS = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level",
    "log_level_replica", "resume_from_checkpoint", "save_total_limit", "project",
    "trackio_space_id", "push_to_hub", "local_rank", "max_steps", "learning_rate", "seed",
    "data_seed", "expected_processes", "train_sampling_strategy", "invocation",
}  # fmt: skip


@dataclass(frozen=True)
class ComparisonOptions:
    """The comparison: which teacher, which starts, which seeds, which steps of the pipeline."""

    _argument_group_name = "comparison"

    teacher: str = field(
        default="lora",
        metadata={
            "help": "lora: train a random-init LoRA and synthesise a teacher from it; full: train "
            "all parameters and take the delta."
        },
    )
    teacher_adapter: str | None = field(
        default=None, metadata={"help": "An existing LoRA as the teacher; its cost counts as sunk."}
    )
    teacher_model: str | None = field(
        default=None,
        metadata={"help": "An existing full fine-tune as the teacher; its cost counts as sunk."},
    )
    teacher_steps: int = field(default=6, metadata={"help": "Optimizer steps of the teacher."})
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the teacher: learning_rate for lora, 5e-5 for full."}
    )
    teacher_rank: int = field(default=64, metadata={"help": "Rank of the teacher's factors."})
    tail_decay: float = field(
        default=0.1, metadata={"help": "Synthesis: decay per appended singular value."}
    )
    noise_share: float = field(
        default=0.1, metadata={"help": "Synthesis: share of the appended energy that is noise."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "One set of runs for each."}
    )
    starts: list[str] = field(
        default_factory=lambda: ["delta", "subspace"],
        metadata={
            "help": "SVD starts to compare: delta, subspace or reference of the teacher, or "
            "source:start, as weight-principal:reference, gradient:delta, activation:subspace "
            "(recipes/stages/starts.py lists them)."
        },
    )
    peft_inits: list[str] = field(
        default_factory=lambda: ["pissa_niter_4"],
        metadata={"help": "PEFT's own starts to compare, such as pissa_niter_4, olora, eva."},
    )
    carry_moments: bool = field(
        default=False,
        metadata={"help": "Also a delta start that goes on with the teacher's Adam moments."},
    )
    sweep_lr: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates of which every method gets its best, on the first seed."},
    )
    from_step: str | None = field(
        default=None, metadata={"help": "First step to run, by name or number."}
    )
    to_step: str | None = field(default=None, metadata={"help": "Last step to run."})
    only: str | None = field(default=None, metadata={"help": "The one step to run."})

    def __post_init__(self) -> None:
        check_name("teacher", self.teacher, ("lora", "full"))
        if self.teacher_adapter and self.teacher_model:
            raise ValueError("teacher_adapter and teacher_model exclude each other")
        check_seeds("seeds", self.seeds)
        check_names("starts", self.starts, CELLS)
        for name in ("peft_inits", "sweep_lr"):
            if given := getattr(self, name):
                check_different(name, given)
        rate = self.teacher_learning_rate
        for name, rates in (
            ("sweep_lr", self.sweep_lr),
            ("teacher_learning_rate", [] if rate is None else [rate]),
        ):
            if not all(rate > 0 for rate in rates):
                raise ValueError(f"{name} must be above 0, got {rates}")
        if self.sunk and not self.taught:
            raise ValueError(
                f"teacher_adapter and teacher_model are of no use to starts={self.starts}; leave "
                "them out, or add delta, subspace or reference"
            )
        if self.carry_moments and (self.sunk or self.teacher != "lora"):
            raise ValueError("carry_moments needs a LoRA teacher that is trained here")
        if self.teacher_steps < 1:
            raise ValueError(f"teacher_steps must be at least 1, got {self.teacher_steps}")
        Synthesis(self.teacher_rank, self.tail_decay, self.noise_share)

    @property
    def sunk(self) -> bool:
        """Whether the teacher exists already."""
        return bool(self.teacher_adapter or self.teacher_model)

    @property
    def taught(self) -> bool:
        """Whether any start needs a teacher."""
        return self.carry_moments or any(CELLS[start].taught for start in self.starts)

    @property
    def trains_teacher(self) -> bool:
        """Whether the comparison makes its own teacher."""
        return self.taught and not self.sunk

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the pipeline's steps."""
        if not self.taught:
            return ("train_random", "train_svd", "compare")
        if self.sunk:
            return ("extract", "train_random", "train_svd", "compare")
        if self.teacher == "full":
            return ("train_teacher", "extract", "train_random", "train_svd", "compare")
        return ("train_random", "synthesize", "train_svd", "compare")


@dataclass(frozen=True)
class Setting:
    """All options of a comparison."""

    comparison: ComparisonOptions
    model: ModelOptions
    data: DataOptions
    lora: LoraOptions
    arguments: RecipeArguments

    @property
    def root(self) -> Path:
        return Path(str(self.arguments.output_dir)) / "runs"

    @property
    def inputs(self) -> dict[str, Any]:
        """What every task depends on."""
        arguments = self.arguments.to_dict()
        return {
            "version": __version__,
            "model": asdict(self.model),
            "model_files": file_stamps(resolve_model(self.model.model_name_or_path)),
            "data": asdict(self.data),
            "data_files": file_stamps(self.data.dataset_name),
            "arguments": {
                key: value
                for key, value in arguments.items()
                if key not in _NOT_INPUTS and not key.startswith(("hub_", "push_"))
            },
            "processes": self.arguments.world_size,
        }


def examples_per_step(arguments: RecipeArguments) -> int:
    """Examples behind one optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
