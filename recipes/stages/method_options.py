"""The options of `method_comparison.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft_svdinit.training import check_different, check_output, check_seeds, strict_json
from stages.method_protocol import Protocol

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments" / "MetaMathQA"
REFERENCE = "lora/llama-3.2-3B-rank32"


@dataclass
class MethodOptions:
    """What is compared, and how."""

    _argument_group_name: ClassVar[str] = "comparison"

    experiments: list[str] = field(
        default_factory=lambda: [
            REFERENCE,
            *(f"{REFERENCE}-svd-{start}" for start in ("delta", "subspace")),
            "lori/llama-3.2-3B-rank32-calibrated",
        ],
        metadata={"help": "Folders <method>/<name> in experiments_dir, the reference first."},
    )
    experiments_dir: str = field(
        default=str(EXPERIMENTS), metadata={"help": "Where the experiments are."}
    )
    training_params: dict | str | None = field(
        default=None,
        metadata={
            "help": "PEFT's training parameters over the published ones: a mapping in a file of "
            "options, or JSON. An experiment's own training_params.json goes before."
        },
    )
    rate_factor: float = field(
        default=1.0,
        metadata={"help": "Times every learning rate, for other models and shorter trainings."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Of the adapter's start; the order of the data is always the same."},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "An adapter, or factors, that SVD starts take: its cost counts as sunk. By "
            "default each seed trains one."
        },
    )
    teacher_steps: int = field(
        default=1000,
        metadata={"help": "Optimizer steps of the teacher, and of LoRI's calibration."},
    )
    start_batches: int = field(
        default=16, metadata={"help": "Batches that a start from gradients or activations reads."}
    )
    only: str | None = field(
        default=None, metadata={"help": "The one step to run: base, starts or runs."}
    )
    output_dir: str = field(
        default="method_comparison",
        metadata={"help": "Folder of the results, the table and the runs."},
    )
    invocation: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.training_params, str):
            try:
                self.training_params = strict_json(self.training_params)
            except ValueError as error:
                raise ValueError(f"training_params must be JSON: {error}") from error
        if not isinstance(self.training_params or {}, dict):
            raise ValueError(f"training_params must be a mapping, got {self.training_params!r}")
        check_different("experiments", self.experiments)
        check_seeds("seeds", self.seeds)
        check_output(self.output_dir)
        for name in ("teacher_steps", "start_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rate_factor > 0:
            raise ValueError(f"rate_factor must be above 0, got {self.rate_factor}")

    @property
    def defaults(self) -> Protocol:
        """The protocol before an experiment's own parameters."""
        given: dict[str, Any] = self.training_params or {}  # pyright: ignore
        return Protocol().updated(given, "training_params")


@dataclass(frozen=True)
class MethodDataOptions:
    """Questions to learn, questions to answer, and general text."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str = field(
        default="meta-math/MetaMathQA",
        metadata={"help": "Hub id, folder, file or builtin: data set to train on, in its order."},
    )
    query_column: str = field(default="query", metadata={"help": "Its questions."})
    response_column: str = field(default="response", metadata={"help": "Its answers."})
    char_limit: int = field(
        default=1300,
        metadata={"help": "Longest question and answer together, in characters, to train on."},
    )
    test_dataset_name: str | None = field(
        default="openai/gsm8k",
        metadata={
            "help": "Questions to answer; those of validation are from its train split, if it has "
            "one. With a builtin: dataset_name it is null, the held-out part of that."
        },
    )
    test_dataset_config: str | None = field(
        default="main", metadata={"help": "Configuration of a Hub data set."}
    )
    test_query_column: str = field(default="question", metadata={"help": "Its questions."})
    test_response_column: str = field(default="answer", metadata={"help": "Its answers."})
    valid_size: int = field(
        default=50, metadata={"help": "Questions answered every eval_steps steps."}
    )
    test_samples: int | None = field(
        default=None, metadata={"help": "Test questions, the first ones; by default all."}
    )
    general_dataset_name: str = field(
        default="HuggingFaceFW/finewiki",
        metadata={"help": "Text whose loss should not rise: Hub id, file or builtin: data set."},
    )
    general_text_column: str = field(default="text", metadata={"help": "Its text."})
    general_samples: int = field(default=100, metadata={"help": "Texts, the first ones."})

    def __post_init__(self) -> None:
        for name in ("valid_size", "general_samples", "char_limit", "test_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.test_dataset_name is None) != self.dataset_name.startswith("builtin:"):
            raise ValueError(
                "test_dataset_name must be null with a builtin: dataset_name, of which a part is "
                f"held out, and only there; got {self.test_dataset_name!r}"
            )
