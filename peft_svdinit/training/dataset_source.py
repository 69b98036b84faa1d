"""A data set by its name: a file, a folder, a built-in or a Hub id; the columns to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .builtin.registry import BuiltinDataset

if TYPE_CHECKING:
    from datasets import Dataset


_TEXT_TYPES = ("string", "large_string")


_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_splits(
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


def named_split(
    splits: Mapping[Any, Dataset], split: str, option: str, dataset_name: str
) -> Dataset:
    if split not in splits:
        raise ValueError(
            f"{option} must be a split of {dataset_name!r}, which has {', '.join(splits)}; "
            f"got {split!r}"
        )
    return splits[split]


def with_standard_columns(
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
