"""Data sets of text to learn: where they come from, how they are split, and the exact labels."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .builtin.registry import BUILTIN_DATASETS, BuiltinDataset, find_builtin
from .tokenizing import _check_length, tokenize_examples

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_TEXT_TYPES = ("string", "large_string")
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

    Without `eval_split`, `eval_fraction` of `train_split` is held out: whole modules or topics of
    a built-in data set, so that none is on both sides, and rows of any other. With one `seed` and
    `eval_fraction`, the two built-in data sets of the standard library hold out the same modules.

    Args:
        dataset_name: a key of `BUILTIN_DATASETS` such as `builtin:stdlib-docstrings`, a file, a
            folder (of `save_to_disk` or of data files), or a Hub id.
        max_train_samples: keep so many of the training examples, drawn with `seed`; a smaller
            number keeps a part of what a larger one keeps. `max_eval_samples` likewise.
        seed: of the split and the draws.

    Returns:
        Training and evaluation set, both with the columns `prompt` and `completion`, or
        `messages`, or `text`: the first of these that the data set has. The built-in ones have
        `module` or `topic` besides.

    Raises:
        ValueError: if the data set, a split or the columns are not there, or a side is empty.
        ModuleNotFoundError: without the package `datasets`.
        RuntimeError: if this Python lacks what a built-in data set is read from.
    """
    _check_split(eval_fraction, max_train_samples, max_eval_samples)
    builtin = find_builtin(dataset_name)
    splits = _load_splits(dataset_name, dataset_config, builtin)
    train = _named_split(splits, train_split, "train_split", dataset_name)
    if eval_split is not None:
        if eval_split == train_split:
            raise ValueError(f"eval_split must differ from train_split, both are {eval_split!r}")
        evaluation = _named_split(splits, eval_split, "eval_split", dataset_name)
    elif builtin:
        train, evaluation = _split_by_group(train, builtin, eval_fraction, seed)
    else:
        train, evaluation = _split_by_row(train, eval_fraction, seed)
    columns = {
        "prompt": prompt_column,
        "completion": completion_column,
        "messages": messages_column,
        "text": text_column,
    }
    extra = [builtin.group_column] if builtin else []
    train = _with_standard_columns(train, columns, extra, dataset_name)
    evaluation = _with_standard_columns(evaluation, columns, extra, dataset_name)
    return _draw(train, max_train_samples, seed), _draw(evaluation, max_eval_samples, seed)


def _load_splits(
    name: str, config: str | None, builtin: BuiltinDataset | None
) -> Mapping[Any, Dataset]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ModuleNotFoundError(
            'data sets need the package datasets; run: pip install "peft-svdinit[data]"'
        ) from None
    if builtin:
        return {"train": datasets.Dataset.from_list(builtin.rows())}
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in _FORMATS:
        raise ValueError(f"dataset_name: a file must end in {', '.join(_FORMATS)}, got {name!r}")
    if not path.exists() and (path.suffix in _FORMATS or name.startswith((".", "/", "~"))):
        raise ValueError(f"dataset_name: there is no file or folder {name!r}")
    try:
        if path.is_file():
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path))
        if (path / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(str(path))
        if (path / "state.json").is_file():
            return {"train": datasets.Dataset.load_from_disk(str(path))}
        return datasets.load_dataset(str(path) if path.is_dir() else name, config)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"dataset_name: cannot load {name!r}: {error.__cause__ or error}"
        ) from error


def _named_split(
    splits: Mapping[Any, Dataset], split: str, option: str, dataset_name: str
) -> Dataset:
    if split not in splits:
        raise ValueError(
            f"{option} must be a split of {dataset_name!r}, which has {', '.join(splits)}; "
            f"got {split!r}"
        )
    return splits[split]


def _split_by_group(
    dataset: Dataset, builtin: BuiltinDataset, fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    """Hold out groups, in an order that only `seed` and their names decide, up to `fraction`."""
    column = builtin.group_column
    sizes = Counter(row[column] for row in builtin.split_rows())
    held_out: set[str] = set()
    room = fraction * sizes.total()
    for group in sorted(sizes, key=lambda g: hashlib.sha256(f"{seed} {g}".encode()).digest()):
        if sizes[group] <= room:
            held_out.add(group)
            room -= sizes[group]
    is_held_out = [group in held_out for group in dataset[column]]
    if not any(is_held_out):
        raise ValueError(
            f"eval_fraction={fraction} of {len(dataset)} examples is smaller than any {column}"
        )
    return (
        dataset.select([row for row, is_out in enumerate(is_held_out) if not is_out]),
        dataset.select([row for row, is_out in enumerate(is_held_out) if is_out]),
    )


def _split_by_row(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(dataset) < 2:
        raise ValueError(
            f"train_split must have at least 2 examples to hold one out, got {len(dataset)}; "
            f"give more data or an eval_split"
        )
    held_out = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
    split = dataset.train_test_split(test_size=held_out, seed=seed)
    return split["train"], split["test"]


def _with_standard_columns(
    dataset: Dataset, columns: Mapping[str, str], extra: list[str], dataset_name: str
) -> Dataset:
    """What is learnt from, as `prompt` and `completion`, `messages` or `text`, and `extra`."""
    for names in (("prompt", "completion"), ("messages",), ("text",)):
        if not all(columns[name] in dataset.column_names for name in names):
            continue
        for name in names:
            feature = dataset.features[columns[name]]
            if (name != "messages") != (getattr(feature, "dtype", "") in _TEXT_TYPES):
                kind = "a list of messages" if name == "messages" else "text"
                raise ValueError(
                    f"{name}_column: {columns[name]!r} of {dataset_name!r} must hold {kind}, "
                    f"it holds {feature}; convert it first, or name another column"
                )
        kept = dataset.select_columns([columns[name] for name in names] + extra)
        return kept.rename_columns({columns[name]: name for name in names})
    raise ValueError(
        f"{dataset_name!r} has the columns {', '.join(dataset.column_names)}; it needs "
        f"{columns['prompt']} and {columns['completion']}, or {columns['messages']}, or "
        f"{columns['text']}: set prompt_column and completion_column, or messages_column, or "
        f"text_column"
    )


def _draw(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def _check_split(fraction: float, *counts: int | None) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction must be in (0, 1), got {fraction}")
    for option, count in zip(("max_train_samples", "max_eval_samples"), counts, strict=True):
        if count is not None and count < 1:
            raise ValueError(f"{option} must be at least 1, got {count}; leave it out for all")
