"""The training log of a run, `training_log.csv`: one row for each log event.

A train row fills `loss`, `learning_rate` and `grad_norm`, an evaluation row the columns that start
with `eval_`. An empty cell means "not measured". `tokens` and `seconds` are cumulative over the
run, and `seconds` counts the training steps only: no evaluation, no checkpoint, no data loading.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import replacing

TRAINING_LOG = "training_log.csv"
INTEGERS = ("step", "tokens")
COLUMNS = (
    *("step", "epoch", "tokens", "loss"),
    *("learning_rate", "grad_norm", "seconds", "peak_memory_mb"),
)
EVAL_PREFIX = "eval_"

Row = dict[str, Any]


class TrainingLog:
    """Writer of one `training_log.csv`, which replaces what is at `path`.

    `rows` start the file. Appending adds one line to it; an evaluation column that was not there
    before rewrites it atomically with the wider header, and so does the first append after one that
    failed, with the rows that it left out.

    Attributes:
        whole: whether the file holds all rows.
    """

    def __init__(self, path: str | os.PathLike, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path = Path(path)
        self.columns = list(COLUMNS)
        self.rows: list[Row] = []
        for row in rows:
            self._take(row)
        self.whole = False
        self._rewrite()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add `row` (absent or None values become empty cells).

        Raises:
            ValueError: if `row` has a column that is neither standard nor an evaluation column.
            OSError: if it cannot be written; `rows` has it.
        """
        if self._take(row) or not self.whole:
            self.whole = False
            self._rewrite()
            return
        self.whole = False
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._line(self.rows[-1]))
        self.whole = True

    def flush(self) -> None:
        """Write the rows that a failed `append` left out.

        Raises:
            OSError: if they cannot be written.
        """
        if not self.whole:
            self._rewrite()

    def _take(self, row: Mapping[str, Any]) -> bool:
        """Keep `row` in memory; whether it brought new columns."""
        new = [column for column in row if column not in self.columns]
        wrong = [column for column in new if not column.startswith(EVAL_PREFIX)]
        if wrong:
            raise ValueError(
                f"a column of a training log must be one of {', '.join(COLUMNS)} or start with "
                f"{EVAL_PREFIX!r}, got {wrong[0]!r}"
            )
        self.columns += new
        self.rows.append(dict(row))
        return bool(new)

    def _line(self, row: Row) -> str:
        return _csv_line(row.get(column) for column in self.columns)

    def _rewrite(self) -> None:
        with replacing(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                file.write(_csv_line(self.columns))
                file.writelines(self._line(row) for row in self.rows)
        self.whole = True


def read_training_log(
    path: str | os.PathLike, *, drop_torn_line: bool = False, argument: str = "run"
) -> list[Row]:
    """The rows of a `training_log.csv`, each with all columns of the file.

    Args:
        path: the file.
        drop_torn_line: ignore a last line without its newline, as a killed writer leaves it.
        argument: by which the user gave the run; the messages of errors begin with it.

    Returns:
        One dict per row: `step` and `tokens` are ints, all others floats (NaN and infinities
        included), an empty cell is None.

    Raises:
        ValueError: if the file is missing, torn, or not a training log.
    """
    path, place = Path(path), f"{argument}: {path}"
    if not path.is_file():
        raise ValueError(f"{place} does not exist; a run with ComparisonCallback writes it")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not a training log: {error}") from error
    if not text.endswith("\n"):
        if not drop_torn_line or "\n" not in text:
            raise ValueError(
                f"{place} is torn: its last line is incomplete; resume the run or delete it"
            )
        text = text[: text.rindex("\n") + 1]
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise ValueError(f"{place} is not a training log: {error}") from error
    extra = header[len(COLUMNS) :]
    if (
        tuple(header[: len(COLUMNS)]) != COLUMNS
        or len(set(extra)) < len(extra)
        or not all(column.startswith(EVAL_PREFIX) for column in extra)
    ):
        raise ValueError(
            f"{place}: the header must be {','.join(COLUMNS)} and then distinct {EVAL_PREFIX}* "
            f"columns, got {','.join(header)}"
        )
    rows: list[Row] = []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header):
            raise ValueError(
                f"{place}, line {number}: {len(header)} cells expected, {len(cells)} found"
            )
        row = {
            name: _parsed(name, cell, f"{place}, line {number}")
            for name, cell in zip(header, cells, strict=True)
        }
        if row["step"] is None or row["step"] < (rows[-1]["step"] if rows else 0):
            raise ValueError(
                f"{place}, line {number}: step must be present and not decrease, got {cells[0]!r}"
            )
        rows.append(row)
    return rows


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _parsed(name: str, cell: str, place: str) -> int | float | None:
    if cell == "":
        return None
    try:
        return int(cell) if name in INTEGERS else float(cell)
    except ValueError:
        raise ValueError(f"{place}: {name} must be a number, got {cell!r}") from None
