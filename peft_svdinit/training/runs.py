"""The directory of one training run: `run.json` beside its training log, and their strict reader.

`run.json` says how the run was made and how it ended; `status` is `"running"` until training has
ended, so a run that was killed stays recognisable.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..files import (
    Amount,
    Count,
    Positive,
    read_json,
    read_together,
    shortened,
    validated,
    write_json,
)
from .log import TRAINING_LOG, Row, read_training_log

FORMAT_VERSION = 1
RUN_INFO = "run.json"
LOSS_CURVE = "loss_curve.png"
INFO_KEYS = (
    *("format_version", "status", "name", "seed", "data_seed", "started", "finished"),
    *("steps", "max_steps", "tokens", "seconds", "peak_memory_mb", "metrics", "world_size"),
    *("trainable_parameters", "total_parameters", "versions", "git_revision", "hardware", "extra"),
)


class _Teacher(msgspec.Struct):
    kind: str | None = None
    steps: Count | None = None
    tokens: Count | None = None
    seconds: Amount | None = None
    sunk: bool | None = None


class _Comparison(msgspec.Struct):
    method: str | None = None
    label: str | None = None
    budget: str | None = None
    learning_rate: Amount | None = None
    sweep: bool | None = None
    teacher: _Teacher | None = None


class _Extra(msgspec.Struct):
    comparison: _Comparison | None = None


class _Hardware(msgspec.Struct):
    cpu_cores: Count | None = None
    device: str | None = None
    memory_gb: Amount | None = None


class _RunsAs(msgspec.Struct):
    processes: Positive | None = None
    wrapper: str | None = None
    stage: int | None = None
    offloaded: list[str] | None = None


class _Info(msgspec.Struct):
    status: str
    name: str
    seed: int
    data_seed: int | None
    started: str | None
    finished: str | None
    steps: Count
    max_steps: Count
    tokens: Count | None
    seconds: Amount | None
    peak_memory_mb: Amount | None
    metrics: dict[str, float | None]
    world_size: Positive
    trainable_parameters: Count | None
    total_parameters: Count | None
    versions: dict[str, str | None]
    git_revision: str | None
    hardware: _Hardware
    extra: _Extra
    runs_as: _RunsAs | None = None


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
    def final_eval_loss(self) -> float | None:
        """The last `eval_loss` of the log, None if the run was never evaluated."""
        losses = [row["eval_loss"] for row in self.log if row.get("eval_loss") is not None]
        return losses[-1] if losses else None


def read_run(directory: str | os.PathLike, argument: str = "run") -> Run:
    """Read one run directory.

    Args:
        directory: of the run.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        ValueError: if a file is missing, torn or malformed, or of an unknown format version.
    """
    directory = Path(directory)
    with read_together(directory / RUN_INFO, argument):
        info = read_run_info(directory, argument)
        return Run(directory, info, read_training_log(directory / TRAINING_LOG, argument=argument))


def read_run_info(directory: str | os.PathLike, argument: str = "run") -> dict[str, Any]:
    """The content of `run.json` in `directory`.

    Raises:
        ValueError: if it is missing, torn or malformed, or of an unknown format version.
    """
    path = Path(directory) / RUN_INFO
    if not path.is_file():
        raise ValueError(
            f"{argument}: {path} does not exist; a run with ComparisonCallback writes it"
        )
    info = read_json(path, argument)
    place = f"{argument}: {path}"
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{place} must have format_version {FORMAT_VERSION}, got "
            f"{shortened(info.get('format_version'))}; read it with the peft-svdinit that wrote it"
        )
    missing = [key for key in INFO_KEYS if key not in info]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}")
    validated(info, _Info, f"{place}: ")
    if info["status"] not in ("running", "completed"):
        raise ValueError(f"{place}: status must be running or completed, got {info['status']!r}")
    return info


def write_run_info(directory: str | os.PathLike, info: Mapping[str, Any]) -> None:
    """Write `run.json` atomically; the format version is added, non-finite numbers become null."""
    write_json(Path(directory) / RUN_INFO, for_json({"format_version": FORMAT_VERSION, **info}))


def for_json(value: Any) -> Any:
    """`value` as JSON can hold it, at any depth: NaN and infinities are null, the unknown text."""
    if isinstance(value, Mapping):
        return {str(key): for_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
