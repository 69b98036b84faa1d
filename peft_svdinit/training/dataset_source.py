"""A data set by its name: a file, a folder, a built-in or a Hub id; the columns to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .builtin.registry import BuiltinDataset
from .data_file import fault_in_file
from .refusal import refused_as

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
    except ImportError:
        raise ModuleNotFoundError(
            'data sets need the package datasets; run: pip install "peft-svdinit[data]"'
        ) from None
    if builtin:
        return {"train": datasets.Dataset.from_list(builtin.rows())}
    path = Path(name).expanduser()
    with refused_as("dataset_name"):
        is_file, exists = path.is_file(), path.exists()
    if is_file and path.suffix not in _FORMATS:
        raise ValueError(f"dataset_name: a file must end in {', '.join(_FORMATS)}, got {name!r}")
    if not exists and (path.suffix in _FORMATS or name.startswith((".", "/", "~"))):
        raise ValueError(f"dataset_name: there is no file or folder {name!r}")
    if not exists and name in _FORMATS.values():
        raise ValueError(f"dataset_name: {name!r} is a format; give the path of a file")
    try:
        with refused_as(f"dataset_name: cannot load {name!r}"):
            return _loaded(path, name, config)
    except ValueError as error:
        if is_file and (fault := fault_in_file(path)):
            raise ValueError(f"dataset_name: cannot load {name!r}: {fault}") from error
        raise


def _loaded(path: Path, name: str, config: str | None) -> Mapping[Any, Dataset]:
    import datasets

    if path.is_file():
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path))
    if (path / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(str(path))
    if (path / "state.json").is_file():
        return {"train": datasets.Dataset.load_from_disk(str(path))}
    return datasets.load_dataset(str(path) if path.is_dir() else name, config)


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
    dataset: Dataset,
    columns: Mapping[str, str],
    extra: list[str],
    dataset_name: str,
    all_used: bool = True,
) -> Dataset:
    """What is learnt from, as `prompt` and `completion`, `messages` or `text`, and `extra`.

    With `all_used`, a column of another name than that is refused where others are learnt from.
    """
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
        _refuse_damaged(kept, dataset_name)
        unused = [name for name, column in columns.items() if column != name and name not in names]
        if all_used and unused:
            name, learnt = unused[0], " and ".join(columns[name] for name in names)
            raise ValueError(
                f"{name}_column={columns[name]} is not used: {dataset_name!r} has the columns "
                f"{', '.join(dataset.column_names)}, and {learnt} would be learnt; correct it, or "
                "leave it out"
            )
        return kept.rename_columns({columns[name]: name for name in names})
    raise ValueError(
        f"{dataset_name!r} has the columns {', '.join(dataset.column_names)}; it needs "
        f"{columns['prompt']} and {columns['completion']}, or {columns['messages']}, or "
        f"{columns['text']}: set prompt_column and completion_column, or messages_column, or "
        f"text_column"
    )


def _refuse_damaged(dataset: Dataset, dataset_name: str) -> None:
    """Refuse text that is not UTF-8, which the reader of JSON lets pass."""
    path = Path(dataset_name).expanduser()
    try:
        with refused_as("its text is damaged"):
            dataset.data.table.select(dataset.column_names).validate(full=True)
    except ValueError as error:
        fault = (fault_in_file(path) if path.is_file() else None) or str(error)
        raise ValueError(f"dataset_name: cannot read {dataset_name!r}: {fault}") from error
