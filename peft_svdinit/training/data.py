"""Data sets of text to learn: where they come from, how they are split, and the exact labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from transformers import PreTrainedTokenizerBase

from .builtin.registry import BUILTIN_DATASETS, find_builtin
from .dataset_source import load_splits, named_split, with_standard_columns
from .seeds import check_seed
from .splitting import drawn, split_by_group, split_by_row
from .tokenizing import check_length, tokenize_examples

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """The data set, its columns and its split."""

    _argument_group_name = "data"
    # Whether its columns are those of more than one data set.
    _for_several: ClassVar[bool] = False

    dataset_name: str = field(
        default="builtin:stdlib-docstrings",
        metadata={
            "help": "Hub id, folder, or .json, .jsonl, .csv, .parquet or .txt file; or, without a "
            "download, "
            + ", ".join(f"{name} ({known.summary})" for name, known in BUILTIN_DATASETS.items())
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a Hub data set that has several"}
    )
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "split to evaluate on; by default a part of train_split is held out"},
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "share of train_split that is held out without eval_split"}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "text that is given, without loss"}
    )
    completion_column: str = field(
        default="completion", metadata={"help": "text to learn, after the prompt"}
    )
    messages_column: str = field(
        default="messages",
        metadata={"help": "conversations, whose last assistant message is learnt"},
    )
    text_column: str = field(
        default="text", metadata={"help": "text to learn as a whole, where no prompt is given"}
    )
    max_length: int = field(
        default=512,
        metadata={"help": "tokens per example; longer ones lose text, the prompt first"},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on at most so many examples, drawn at random"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on at most so many examples, drawn at random"}
    )
    split_seed: int = field(
        default=0,
        metadata={"help": "seed of the held-out part and of the examples drawn, not of training"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {self.eval_fraction}")
        for option in ("max_train_samples", "max_eval_samples"):
            count = getattr(self, option)
            if count is not None and count < 1:
                raise ValueError(f"{option} must be at least 1, got {count}; leave it out for all")
        check_seed("split_seed", self.split_seed)
        check_length(self.max_length)


def prepare_examples(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Training and evaluation examples as the options say, in tokens."""
    train, evaluation = load_examples(options)
    return (
        tokenize_examples(train, tokenizer, options.max_length),
        tokenize_examples(evaluation, tokenizer, options.max_length),
    )


def load_examples(options: DataOptions) -> tuple[Dataset, Dataset]:
    """Examples to train on and examples to evaluate on.

    Without `eval_split`, `eval_fraction` of `train_split` is held out: whole modules or topics of
    a built-in data set, so that none is on both sides, and rows of any other. With one `split_seed`
    and `eval_fraction`, the two built-in data sets of the standard library hold out the same
    modules. Of examples drawn, a smaller number keeps a part of what a larger one keeps.

    Returns:
        Training and evaluation set, both with the columns `prompt` and `completion`, or
        `messages`, or `text`: the first of these that the data set has. The built-in ones have
        `module` or `topic` besides.

    Raises:
        ValueError: if the data set, a split or the columns are not there, or a side is empty.
        ModuleNotFoundError: without the package `datasets`.
        RuntimeError: if this Python lacks what a built-in data set is read from.
    """
    name, seed = options.dataset_name, options.split_seed
    builtin = find_builtin(name)
    if options.dataset_config and (builtin or Path(name).expanduser().is_file()):
        raise ValueError(
            f"dataset_config={options.dataset_config} is of a data set of the Hub or a folder, "
            f"and dataset_name={name} is neither; leave it out"
        )
    splits = load_splits(name, options.dataset_config, builtin)
    train = named_split(splits, options.train_split, "train_split", name)
    if options.eval_split is not None:
        if options.eval_split == options.train_split:
            raise ValueError(
                f"eval_split must differ from train_split, both are {options.eval_split!r}"
            )
        evaluation = named_split(splits, options.eval_split, "eval_split", name)
    elif builtin:
        train, evaluation = split_by_group(train, builtin, options.eval_fraction, seed)
    else:
        train, evaluation = split_by_row(train, options.eval_fraction, seed)
    columns = {
        "prompt": options.prompt_column,
        "completion": options.completion_column,
        "messages": options.messages_column,
        "text": options.text_column,
    }
    extra = [builtin.group_column] if builtin else []
    asked = (columns, extra, name, not options._for_several)
    train, evaluation = (with_standard_columns(side, *asked) for side in (train, evaluation))
    return (
        drawn(train, options.max_train_samples, seed),
        drawn(evaluation, options.max_eval_samples, seed),
    )
