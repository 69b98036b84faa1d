"""What of a data set is held out, and what is drawn of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from .builtin.registry import BuiltinDataset

if TYPE_CHECKING:
    from datasets import Dataset


def split_by_group(
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


def split_by_row(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(dataset) < 2:
        raise ValueError(
            f"train_split must have at least 2 examples to hold one out, got {len(dataset)}; "
            f"give more data or an eval_split"
        )
    held_out = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
    split = dataset.train_test_split(test_size=held_out, seed=seed)
    return split["train"], split["test"]


def drawn(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))
