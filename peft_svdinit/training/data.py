"""Data sets of text to learn: where they come from, how they are split, and the exact labels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from peft_svdinit.embedded import stdlib_docstrings

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
_BUILTIN = "builtin:stdlib-docstrings"
_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True)
class DataOptions:
    """The data set, its columns and its split."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default=_BUILTIN,
        metadata={
            "help": "Hub id, folder, or .json, .jsonl, .csv, .parquet or .txt file; "
            f"or {_BUILTIN}, docstrings of this Python's standard library"
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
        default=512, metadata={"help": "tokens per example; longer ones lose text, the prompt first"}
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
        _check_split(self.eval_fraction, self.max_train_samples, self.max_eval_samples)
        _check_length(self.max_length)


def prepare_examples(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """`load_examples` and `tokenize_examples` as the options say: training and evaluation."""
    train, evaluation = load_examples(
        options.dataset_name,
        dataset_config=options.dataset_config,
        train_split=options.train_split,
        eval_split=options.eval_split,
        eval_fraction=options.eval_fraction,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        messages_column=options.messages_column,
        text_column=options.text_column,
        max_train_samples=options.max_train_samples,
        max_eval_samples=options.max_eval_samples,
        seed=options.split_seed,
    )
    return (
        tokenize_examples(train, tokenizer, options.max_length),
        tokenize_examples(evaluation, tokenizer, options.max_length),
    )


def load_examples(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.1,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    text_column: str = "text",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Examples to train on and examples to evaluate on.

    Without `eval_split`, `eval_fraction` of `train_split` is held out: whole modules of the
    built-in data set, so that no module is on both sides, and rows of any other.

    Args:
        dataset_name: `builtin:stdlib-docstrings`, a file, a folder (of `save_to_disk` or of data
            files), or a Hub id.
        max_train_samples: keep so many of the training examples, drawn with `seed`; a smaller
            number keeps a part of what a larger one keeps. `max_eval_samples` likewise.
        seed: of the split and the draws.

    Returns:
        Training and evaluation set, both with the columns `prompt` and `completion`, or
        `messages`, or `text`: the first of these that the data set has. The built-in one has
        `module` besides.

    Raises:
        ValueError: if the data set, a split or the columns are not there, or a side is empty.
        ModuleNotFoundError: without the package `datasets`.
    """
    _check_split(eval_fraction, max_train_samples, max_eval_samples)
    splits = _load_splits(dataset_name, dataset_config)
    train = _named_split(splits, train_split, "train_split", dataset_name)
    if eval_split is not None:
        if eval_split == train_split:
            raise ValueError(f"eval_split must differ from train_split, both are {eval_split!r}")
        evaluation = _named_split(splits, eval_split, "eval_split", dataset_name)
    elif dataset_name == _BUILTIN:
        train, evaluation = _split_by_module(train, eval_fraction, seed)
    else:
        train, evaluation = _split_by_row(train, eval_fraction, seed)
    columns = {
        "prompt": prompt_column,
        "completion": completion_column,
        "messages": messages_column,
        "text": text_column,
    }
    return (
        _draw(_renamed(train, columns, dataset_name), max_train_samples, seed),
        _draw(_renamed(evaluation, columns, dataset_name), max_eval_samples, seed),
    )


def tokenize_examples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids and labels; the loss is on completions only.

    Prompt and completion are tokenised apart, so the labels are exactly the completion's tokens
    and the end token. The prompt of a conversation is the chat template of all that comes before
    the last assistant message, which is the completion. Of a plain text every token is a label.

    An example beyond `max_length` loses the start of its prompt, down to a quarter of
    `max_length`, then the end of its completion; a text loses its end. Examples without a
    completion (or text) are dropped and counted in the log.

    Args:
        dataset: of `load_examples`.
        tokenizer: with an end-of-sequence token. A start token is put first if the tokenizer
            does so itself.
        max_length: tokens per example, at least 2.

    Returns:
        A data set of `input_ids`, `attention_mask` and `labels` (-100 where there is no loss).

    Raises:
        ValueError: if no example is left, or the tokenizer lacks what the data needs.
    """
    _check_length(max_length)
    encode = _Encoder(tokenizer, max_length)
    tokenized = dataset.map(
        _encode_batch,
        fn_kwargs={"encode": encode},
        batched=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
    dropped = len(dataset) - len(tokenized)
    if not len(tokenized):
        raise ValueError(
            f"none of the {len(dataset)} examples has a completion or text to learn from"
        )
    if dropped:
        logger.warning("dropped %d of %d examples: nothing to learn from", dropped, len(dataset))
    return tokenized


def completion_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads a batch to its longest example: ids with the padding token, labels with -100."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
