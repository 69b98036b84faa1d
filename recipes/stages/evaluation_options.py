"""The options of `evaluate_adapter.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    check_name,
    check_names,
    check_output,
)

METRICS = ("loss", "exact_match", "forgetting")
AS_IT_IS = "{question}"
_COLUMNS = (("prompt", "completion"), ("question", "answer"))


@dataclass
class EvaluationOptions:
    """The adapters, and what is measured."""

    _argument_group_name = "evaluation"
    # Of a model that is loaded as the teacher.
    _known_as: ClassVar = {"teacher": ["model_name_or_path"]}

    adapters: list[str] = field(
        metadata={
            "help": "Folders or Hub ids (user/name@revision) of adapters, each as path or "
            "name=path; the name is that of its row, by default the path's last part."
        }
    )
    output_dir: str = field(
        default="evaluation", metadata={"help": "Folder of evaluation.json and evaluation.md."}
    )
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS),
        metadata={
            "help": "loss: on the held-out part of dataset_name; exact_match: of greedy answers; "
            "forgetting: loss on general text over the base's."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Adapter or fine-tuned model with which all are compared: KL divergence and "
            "top-1 agreement on the held-out part. It is loaded beside the base."
        },
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse adapters of another base model."}
    )
    eval_batch_size: int = field(default=16, metadata={"help": "Examples at a time."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if there is one"}
    )

    invocation: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ValueError("adapters must name at least one adapter")
        check_names("metrics", self.metrics, METRICS)
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")
        check_output(self.output_dir)


@dataclass(frozen=True)
class AdaptedModelOptions(ModelOptions):
    """The base model, and how it is loaded."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder or builtin: model; by default the adapters' own base"},
    )
    model_revision: str | None = field(
        default=None,
        metadata={
            "help": "branch, tag or commit of a model from the Hub; by default the one that the "
            "adapters name, or else main"
        },
    )


@dataclass(frozen=True)
class HeldOutOptions(DataOptions):
    """The data set, its columns and its split; only the held-out part is read."""

    max_eval_samples: int | None = field(
        default=64, metadata={"help": "evaluate on at most so many examples, drawn at random"}
    )


@dataclass(frozen=True)
class ExactMatchOptions:
    """Questions to answer."""

    _argument_group_name = "exact match"
    _known_as: ClassVar = {
        "exact_match_dataset": ["dataset_name"],
        "exact_match_config": ["dataset_config"],
        "exact_match_split": ["eval_split"],
        "exact_match_columns": ["prompt_column", "completion_column"],
    }

    exact_match_dataset: str = field(
        default="builtin:arithmetic",
        metadata={"help": "Hub id, folder, file or builtin: data set of questions and answers."},
    )
    exact_match_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set, main of openai/gsm8k."}
    )
    exact_match_split: str | None = field(
        default=None, metadata={"help": "Split to answer; by default a part is held out."}
    )
    exact_match_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the question and of the answer; by default prompt and completion, "
            "or question and answer."
        },
    )
    exact_match_template: str = field(
        default=AS_IT_IS,
        metadata={"help": r"What is asked, such as 'Question: {question}\nAnswer:'."},
    )
    exact_match_stop: list[str] = field(
        default_factory=lambda: ["Question:"],
        metadata={
            "help": "Texts at the first of which an answer ends, as in lm-evaluation-harness, for "
            "models that go on with another question."
        },
    )
    exact_match_answers: str = field(
        default="numeric",
        metadata={"help": "numeric: the number that an answer ends in; text: all of it."},
    )
    exact_match_samples: int = field(default=32, metadata={"help": "Questions, drawn at random."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer in tokens."})
    generation_batch_size: int = field(default=32, metadata={"help": "Questions at a time."})
    shown_answers: int = field(default=5, metadata={"help": "Answers kept in the JSON."})

    def __post_init__(self) -> None:
        check_name("exact_match_answers", self.exact_match_answers, ("text", "numeric"))
        # A shell and argparse pass the two characters of an escape on as they are.
        object.__setattr__(self, "exact_match_template", _unescaped(self.exact_match_template))
        object.__setattr__(self, "exact_match_stop", [*map(_unescaped, self.exact_match_stop)])
        if "" in self.exact_match_stop:
            raise ValueError("exact_match_stop must not have an empty text, which ends any answer")
        if "{question}" not in self.exact_match_template:
            raise ValueError(
                f"exact_match_template must have {{question}}, got {self.exact_match_template!r}"
            )
        if self.exact_match_columns is not None and len(self.exact_match_columns) != 2:
            raise ValueError(
                "exact_match_columns must be the question's and the answer's, got "
                f"{self.exact_match_columns}"
            )
        for option in ("exact_match_samples", "max_new_tokens", "generation_batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")
        if self.shown_answers < 0:
            raise ValueError(f"shown_answers must be at least 0, got {self.shown_answers}")

    def data(self, others: DataOptions) -> list[DataOptions]:
        """As options of data, with each pair of columns that may be meant."""
        own = {
            "dataset_name": self.exact_match_dataset,
            "dataset_config": self.exact_match_config,
            "eval_split": self.exact_match_split,
            "max_eval_samples": self.exact_match_samples,
        }
        pairs = [self.exact_match_columns] if self.exact_match_columns else _COLUMNS
        return [
            _with_defaults(others, **own, prompt_column=question, completion_column=answer)
            for question, answer in pairs
        ]


@dataclass(frozen=True)
class ForgettingOptions:
    """General text, on which the base's loss should not rise."""

    _argument_group_name = "forgetting"
    _known_as: ClassVar = {
        "forgetting_dataset": ["dataset_name"],
        "forgetting_config": ["dataset_config"],
        "forgetting_split": ["eval_split"],
        "forgetting_text_column": ["text_column"],
    }

    forgetting_dataset: str = field(
        default="builtin:python-topics",
        metadata={"help": "Hub id, folder, file or builtin: data set of text."},
    )
    forgetting_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set."}
    )
    forgetting_split: str | None = field(
        default=None, metadata={"help": "Split to read; by default a part is held out."}
    )
    forgetting_text_column: str = field(default="text", metadata={"help": "Column of the text."})
    forgetting_samples: int = field(default=64, metadata={"help": "Texts, drawn at random."})

    def __post_init__(self) -> None:
        if self.forgetting_samples < 1:
            raise ValueError(
                f"forgetting_samples must be at least 1, got {self.forgetting_samples}"
            )

    def data(self, others: DataOptions) -> DataOptions:
        """As options of data."""
        return _with_defaults(
            others,
            dataset_name=self.forgetting_dataset,
            dataset_config=self.forgetting_config,
            eval_split=self.forgetting_split,
            text_column=self.forgetting_text_column,
            max_eval_samples=self.forgetting_samples,
        )


@dataclass(frozen=True)
class HarnessOptions:
    """lm-evaluation-harness, where it is installed."""

    _argument_group_name = "lm-evaluation-harness"

    lm_eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Its tasks, such as gsm8k hellaswag."}
    )
    lm_eval_include_path: str | None = field(
        default=None, metadata={"help": "Folder with YAML files of further tasks."}
    )
    lm_eval_limit: int | None = field(
        default=None, metadata={"help": "Examples of each task; by default all."}
    )

    def __post_init__(self) -> None:
        if self.lm_eval_tasks is None and self.lm_eval_include_path is not None:
            raise ValueError("lm_eval_include_path needs lm_eval_tasks, the tasks to run")
        if self.lm_eval_limit is not None:
            if self.lm_eval_tasks is None:
                raise ValueError("lm_eval_limit needs lm_eval_tasks, the tasks to run")
            if self.lm_eval_limit < 1:
                raise ValueError(f"lm_eval_limit must be at least 1, got {self.lm_eval_limit}")


def _unescaped(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _with_defaults(others: DataOptions, **own: Any) -> DataOptions:
    """Data of its own, that shares with `others` how examples are drawn and cut."""
    shared = ("split_seed", "eval_fraction", "max_length")
    return replace(DataOptions(), **{name: getattr(others, name) for name in shared}, **own)
