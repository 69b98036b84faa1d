"""What the Trainer logs as rows of a training log, and which of them a resumed run keeps."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from peft_svdinit.training import EVAL_PREFIX, Row, read_training_log

logger = logging.getLogger(__name__)

# What the Trainer adds to an evaluation's metrics about the evaluation itself.
_SPEEDS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


def row_of(logs: Mapping[str, Any]) -> Row | None:
    """A log event as a row; None if it has neither a training loss nor an evaluation's metrics.

    The Trainer's closing summary is such an event: it has `train_loss` and `train_runtime`.
    """
    numbers_of = {
        name: float(value) for name, value in logs.items() if isinstance(value, numbers.Real)
    }
    row = {
        name: numbers_of[name]
        for name in ("loss", "learning_rate", "grad_norm")
        if name in numbers_of
    }
    metrics = {
        name: value
        for name, value in numbers_of.items()
        if name.startswith(EVAL_PREFIX) and not name.endswith(_SPEEDS)
    }
    if "loss" not in row and not metrics:
        return None
    return {
        "step": int(logs["step"]),
        "epoch": logs.get("epoch"),
        "tokens": logs.get("num_input_tokens_seen"),
        **row,
        **metrics,
    }


def rows_to_keep(path: Path, state: TrainerState) -> list[Row]:
    """The rows up to the step that is resumed from."""
    history: dict[tuple, Row] = {}
    for entry in state.log_history:
        row = row_of(entry)
        if row is not None:
            # Resuming with eval_on_start puts an evaluation into the history a second time.
            history.setdefault((row["step"], frozenset(row)), row)
    if not path.exists():
        return list(history.values())
    try:
        rows = read_training_log(path, drop_torn_line=True)
    except ValueError as error:
        logger.warning("rebuilt from the checkpoint's history: %s", error)
        return list(history.values())
    kept = [row for row in rows if row["step"] <= state.global_step]
    # As text, where NaN equals NaN.
    losses = {(row["step"], str(row["loss"])) for row in kept}
    if all((row["step"], str(row["loss"])) in losses for row in history.values() if "loss" in row):
        return kept
    logger.warning("%s is not the log of the checkpoint that is resumed; rebuilt from it", path)
    return list(history.values())
