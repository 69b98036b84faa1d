"""The data of PEFT's method comparison: batches of like lengths, labels, questions, text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_svdinit.training import (
    IGNORED_LABEL,
    DataOptions,
    ModelOptions,
    load_examples,
    load_splits,
    load_tokenizer,
    named_split,
    refused_as,
    said_of,
)
from stages.answers import Questions
from stages.method_options import MethodDataOptions
from stages.method_protocol import Protocol
from stages.token_losses import padded

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
BUCKET = 20  # batches whose examples are sorted by length together
Ids = list[int]


@dataclass(frozen=True)
class MethodData:
    """What all runs share.

    Attributes:
        train: token ids of questions with answers, in the data set's order.
        valid, test: questions, and the texts that answer them.
        answered: the test questions with their answers, of which the answers have a loss.
        general: text.
    """

    tokenizer: PreTrainedTokenizerBase
    train: list[Ids]
    valid: Questions
    test: Questions
    answered: Dataset
    general: Dataset

    @classmethod
    def prepare(cls, options: MethodDataOptions, protocol: Protocol, examples: int) -> MethodData:
        """Load and tokenise them, `examples` to train on.

        Raises:
            ValueError: if a data set or a column is not there, or too small.
        """
        with said_of("model_name_or_path", "model_id"):
            tokenizer = load_tokenizer(ModelOptions(model_name_or_path=protocol.model_id))
        train, valid, test = _pairs(options)
        short = ((q, a) for q, a in train if len(f"{q} {a}") <= options.char_limit)
        template, limit = protocol.query_template, protocol.max_seq_length

        def ids(texts: Sequence[str]) -> list[Ids]:
            return [row[:limit] for row in tokenizer(list(texts))["input_ids"]] if texts else []  # pyright: ignore

        def asked(pairs: list[tuple[str, str]]) -> Questions:
            prompts = ids([template.format(query=query) for query, _ in pairs])
            return Questions(prompts, [answer for _, answer in pairs])

        learnt = ids([template.format(query=q) + a for q, a in islice(short, examples)])
        if len(learnt) < examples:
            raise ValueError(
                f"dataset_name: {options.dataset_name} has {len(learnt)} examples of at most "
                f"char_limit={options.char_limit} characters, and max_steps and teacher_steps "
                f"together take {examples}; train for fewer steps"
            )
        questions = asked(test)
        whole = ids([template.format(query=query) + answer for query, answer in test])
        labels = [_answer_labels(*pair) for pair in zip(questions.prompts, whole, strict=True)]
        general = ids(_general_texts(options))
        for option, rows in (("test_dataset_name", labels), ("general_dataset_name", general)):
            if not any(label != IGNORED_LABEL for row in rows for label in row[1:]):
                raise ValueError(
                    f"{option}: there is nothing to predict within max_seq_length={limit} tokens"
                )
        return cls(
            tokenizer,
            learnt,
            asked(valid),
            questions,
            Dataset.from_dict({"input_ids": whole, "labels": labels}),
            Dataset.from_dict({"input_ids": general, "labels": general}),
        )

    def batches(self, first: int, count: int, size: int) -> Iterator[dict[str, Tensor]]:
        """`count` training examples from number `first` on, as the model takes them."""
        end: Any = self.tokenizer.eos_token_id
        for rows in bucketed(self.train[first : first + count], size):
            yield collated(rows, end)


def bucketed(rows: Sequence[Ids], size: int) -> Iterator[list[Ids]]:
    """Batches of `size`; within every 20 of them, the longest rows first."""
    for start in range(0, len(rows), size * BUCKET):
        bucket = sorted(rows[start : start + size * BUCKET], key=len, reverse=True)
        for place in range(0, len(bucket), size):
            yield bucket[place : place + size]


def collated(rows: Sequence[Ids], end: int) -> dict[str, Int[Tensor, "batch length"]]:
    """Rows padded with the end token, whose first one is learnt.

    Of all padding without a loss no model would learn to end, and with all of it nothing else. The
    longest row has no padding, and so no end.
    """
    ids = padded(rows, end)
    labels = ids.clone()
    for label, row in zip(labels, rows, strict=True):
        label[len(row) + 1 :] = IGNORED_LABEL
    return {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": labels,
    }


def _answer_labels(prompt: Ids, whole: Ids) -> Ids:
    """The whole without a loss where it is the prompt; a token across the seam is the answer's."""
    pairs = zip(prompt, whole, strict=False)
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), len(prompt))
    return [IGNORED_LABEL] * min(shared, len(whole)) + whole[shared:]


Pairs = list[tuple[str, str]]


def _pairs(options: MethodDataOptions) -> tuple[Iterator[tuple[str, str]], Pairs, Pairs]:
    """Questions and answers to train on, to validate with, and to test with."""
    name, columns = options.dataset_name, (options.query_column, options.response_column)
    if name.startswith("builtin:"):
        train, held_out = load_examples(DataOptions(dataset_name=name))
        columns = ("prompt", "completion")
    else:
        train, held_out = _training_split(name), None
    others = (options.test_query_column, options.test_response_column)
    splits: Mapping[Any, Any] = {"test": held_out}
    if options.test_dataset_name is None:
        others = columns
    else:
        with said_of("dataset_name", "test_dataset_name"):
            splits = load_splits(options.test_dataset_name, options.test_dataset_config, None)
    test = splits["test" if "test" in splits else "train"]
    if "train" in splits and "test" in splits:
        # PEFT's draw: numpy's global generator of seed 0, which shuffles the numbers of the rows.
        drawn = np.random.RandomState(0).permutation(len(splits["train"]))[: options.valid_size]
        valid = splits["train"].select(drawn)
    else:
        if options.valid_size >= len(test):
            raise ValueError(
                f"valid_size={options.valid_size} leaves none of the {len(test)} questions of "
                f"test_dataset_name={options.test_dataset_name} to test with; give more of them, "
                "or validate with fewer"
            )
        valid = test.select(range(options.valid_size))
        test = test.select(range(len(valid), len(test)))
    if options.test_samples is not None:
        test = test.select(range(min(options.test_samples, len(test))))
    return (
        _rows(train, columns, "query_column and response_column"),
        list(_rows(valid, others, "test_query_column and test_response_column")),
        list(_rows(test, others, "test_query_column and test_response_column")),
    )


def _rows(dataset: Dataset, columns: tuple[str, str], argument: str) -> Iterator[tuple[str, str]]:
    missing = set(columns) - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{argument} must be of the columns {', '.join(dataset.column_names)}, got "
            f"{', '.join(sorted(missing))}"
        )
    for number, row in enumerate(dataset, 1):
        pair = [row[column] for column in columns]  # pyright: ignore
        if not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{argument} must hold text, and row {number} has {pair}")
        yield pair[0], pair[1]


def _general_texts(options: MethodDataOptions) -> list[str]:
    name, count = options.general_dataset_name, options.general_samples
    if name.startswith("builtin:"):
        rows: Any = load_examples(DataOptions(dataset_name=name))[1]
        return [row["prompt"] + row["completion"] for row in islice(rows, count)]
    with said_of("dataset_name", "general_dataset_name"):
        if Path(name).exists() or Path(name).suffix in _SUFFIXES:
            rows = _training_split(name)
        else:
            # Streamed, for the first rows of it need no download of all.
            with refused_as(f"dataset_name: cannot load {name!r}"):
                rows = datasets.load_dataset(name, split="train", streaming=True)
    found: list[Mapping[str, Any]] = list(islice(rows, count))
    if not found or options.general_text_column not in found[0]:
        raise ValueError(
            f"general_text_column must be of the columns {', '.join(found[0] if found else [])} of "
            f"{name}, got {options.general_text_column!r}"
        )
    texts = [row[options.general_text_column] for row in found]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"general_text_column: {options.general_text_column!r} of {name} must hold text"
        )
    return texts


def _training_split(name: str) -> Dataset:
    return named_split(load_splits(name, None, None), "train", "dataset_name", name)
