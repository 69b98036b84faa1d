"""The directory of one training run: `training_log.csv`, `run.json`, and their strict readers.

`training_log.csv` has one row per log event of the training: a train row fills `loss`,
`learning_rate` and `grad_norm`, an evaluation row the columns that start with `eval_`. An empty
cell means "not measured". `tokens` and `seconds` are cumulative over the run, and `seconds` counts
the training steps only: no evaluation, no checkpoint, no data loading.

`run.json` says how the run was made and how it ended; `status` is `"running"` until training has
ended, so a run that was killed stays recognisable.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_svdinit.atomic import replacing, write_json

FORMAT_VERSION = 1
TRAINING_LOG = "training_log.csv"
RUN_INFO = "run.json"
LOSS_CURVE = "loss_curve.png"
COLUMNS = (
    "step",
    "epoch",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "seconds",
    "peak_memory_mb",
)
EVAL_PREFIX = "eval_"
INFO_KEYS = (
    "format_version",
    "status",
    "name",
    "seed",
    "data_seed",
    "steps",
    "max_steps",
    "tokens",
    "seconds",
    "peak_memory_mb",
    "trainable_parameters",
    "total_parameters",
    "world_size",
    "metrics",
    "versions",
    "git_revision",
    "hardware",
    "started",
    "finished",
    "extra",
)
_INTEGERS = ("step", "tokens")

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
            file.write(_csv_line(self.rows[-1].get(column) for column in self.columns))
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
        for column in new:
            if not column.startswith(EVAL_PREFIX):
                raise ValueError(
                    f"a column of a training log must be one of {', '.join(COLUMNS)} or start with "
                    f"{EVAL_PREFIX!r}, got {column!r}"
                )
        self.columns += new
        self.rows.append(dict(row))
        return bool(new)

    def _rewrite(self) -> None:
        with replacing(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                file.write(_csv_line(self.columns))
                for row in self.rows:
                    file.write(_csv_line(row.get(column) for column in self.columns))
        self.whole = True


def read_training_log(path: str | os.PathLike, *, drop_torn_line: bool = False) -> list[Row]:
    """The rows of a `training_log.csv`, each with all columns of the file.

    Args:
        path: the file.
        drop_torn_line: ignore a last line without its newline, as a killed writer leaves it.

    Returns:
        One dict per row: `step` and `tokens` are ints, all others floats (NaN and infinities
        included), an empty cell is None.

    Raises:
        ValueError: if the file is missing, torn, or not a training log.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; a run with ComparisonCallback writes it"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a training log: {error}") from error
    if not text.endswith("\n"):
        if not drop_torn_line or "\n" not in text:
            raise ValueError(
                f"{path} is torn: its last line is incomplete; resume the run or delete it"
            )
        text = text[: text.rindex("\n") + 1]
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise ValueError(f"{path} is not a training log: {error}") from error
    extra = header[len(COLUMNS) :]
    if (
        tuple(header[: len(COLUMNS)]) != COLUMNS
        or len(set(extra)) < len(extra)
        or not all(column.startswith(EVAL_PREFIX) for column in extra)
    ):
        raise ValueError(
            f"the header of {path} must be {','.join(COLUMNS)} and then distinct {EVAL_PREFIX}* "
            f"columns, got {','.join(header)}"
        )
    rows: list[Row] = []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(header)} cells expected, {len(cells)} found"
            )
        row = {
            name: _parsed(name, cell, path, number)
            for name, cell in zip(header, cells, strict=True)
        }
        if row["step"] is None or row["step"] < (rows[-1]["step"] if rows else 0):
            raise ValueError(
                f"{path}, line {number}: step must be present and not decrease, got {cells[0]!r}"
            )
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Run:
    """One run directory as read from disk: `info` is `run.json`, `log` the training log's rows."""

    directory: Path
    info: dict[str, Any]
    log: list[Row]

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def completed(self) -> bool:
        return self.info["status"] == "completed"

    @property
    def seed(self) -> int:
        return self.info["seed"]

    @property
    def comparison(self) -> dict[str, Any] | None:
        """What the run is in a comparison (`extra["comparison"]`), None for any other run."""
        return self.info["extra"].get("comparison")

    @property
    def method(self) -> str | None:
        return None if self.comparison is None else self.comparison["method"]

    @property
    def final_eval_loss(self) -> float | None:
        """The last `eval_loss` of the log, None if the run was never evaluated."""
        losses = [row["eval_loss"] for row in self.log if row.get("eval_loss") is not None]
        return losses[-1] if losses else None


def read_run(directory: str | os.PathLike) -> Run:
    """Read one run directory.

    Raises:
        ValueError: if a file is missing, torn or malformed, or of an unknown format version.
    """
    directory = Path(directory)
    return Run(directory, read_run_info(directory), read_training_log(directory / TRAINING_LOG))


def read_run_info(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of `run.json` in `directory`.

    Raises:
        ValueError: if it is missing, torn or malformed, or of an unknown format version.
    """
    path = Path(directory) / RUN_INFO
    try:
        info = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} does not exist; a run with ComparisonCallback writes it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is torn or not JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(info).__name__}")
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format_version {FORMAT_VERSION}, got "
            f"{info.get('format_version')!r}; read it with the peft-svdinit that wrote it"
        )
    missing = [key for key in INFO_KEYS if key not in info]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if info["status"] not in ("running", "completed"):
        raise ValueError(f"{path}: status must be running or completed, got {info['status']!r}")
    for key in ("metrics", "extra"):
        if not isinstance(info[key], dict):
            raise ValueError(f"{path}: {key} must be an object, got {info[key]!r}")
    return info


def write_run_info(directory: str | os.PathLike, info: Mapping[str, Any]) -> None:
    """Write `run.json` atomically; the format version is added, non-finite numbers become null."""
    write_json(Path(directory) / RUN_INFO, _finite({"format_version": FORMAT_VERSION, **info}))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its inputs: `versions`, `git_revision` and `hardware`.

    A package that is not installed has version None. Nothing here identifies the machine or the
    user: `hardware` is the number of usable cores, the accelerator's model or the device type, and
    the physical memory in GiB.
    """
    packages = ("torch", "transformers", "peft", "accelerate", "peft_svdinit")
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "git_revision": git_revision(Path(__file__).parent),
        "hardware": {
            "cpu_cores": _usable_cores(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "memory_gb": _physical_memory_gb(),
        },
    }


def git_revision(directory: str | os.PathLike) -> str | None:
    """The commit checked out in `directory`; None without git or where git does not track it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", os.fspath(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return result.stdout.strip()

    try:
        # An installed package may lie in a virtual environment inside somebody else's repository.
        return git("rev-parse", "HEAD") if git("ls-files", ".") else None
    except (OSError, subprocess.SubprocessError):
        return None


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(
        "" if value is None else value for value in values
    )
    return line.getvalue()


def _parsed(name: str, cell: str, path: Path, line: int) -> int | float | None:
    if cell == "":
        return None
    try:
        return int(cell) if name in _INTEGERS else float(cell)
    except ValueError:
        raise ValueError(f"{path}, line {line}: {name} must be a number, got {cell!r}") from None


def _finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    # The affinity, where there is one, respects the limits of a container or a job.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _physical_memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None
