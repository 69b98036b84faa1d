"""A callback that leaves a run directory behind from which runs can be compared."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count

from peft_svdinit.analysis import check_matplotlib, plot_loss_curve
from peft_svdinit.files import Amount, validated
from peft_svdinit.training import (
    EVAL_PREFIX,
    LOSS_CURVE,
    RUN_INFO,
    TRAINING_LOG,
    Row,
    RunsAs,
    TrainingLog,
    describe_environment,
    peak_memory_mb,
    read_run_info,
    reset_peak_memory,
    write_run_info,
)
from trainer_callbacks.logged_rows import row_of, rows_to_keep
from trainer_callbacks.owning_trainer import calling_trainer
from trainer_callbacks.sparing import Sparing, prepare_folder
from trainer_callbacks.step_clock import StepClock, step_clock

logger = logging.getLogger(__name__)

_MEASURED = ("seconds and memory of all steps", "Compare the run by steps or tokens.")
_AGAIN = "Make room for it and resume from the last checkpoint."


class _Attributes(msgspec.Struct):
    seconds: Amount | None
    peak_memory_mb: Amount | None


class _Saved(msgspec.Struct):
    """What a checkpoint keeps of the callback."""

    attributes: _Attributes


class ComparisonCallback(TrainerCallback, ExportableState):
    """Record a training run as `training_log.csv`, `run.json` and `loss_curve.png`.

    The files are those of `peft_svdinit.training`. Only the main process writes, only during
    `train()`: an evaluation before or after it is not recorded. A metric that is no single number,
    and the timings of an evaluation, are left out.

    A run resumed from the checkpoint of step k keeps the rows up to step k and drops the later
    ones, which training logs again. Where the log is not that of the checkpoint (another
    `output_dir`), the earlier rows are rebuilt from the checkpoint's history, without seconds and
    memory. With `eval_on_start` the Trainer evaluates once more when it resumes; that is not
    recorded, so that the rows are those of an uninterrupted run. One difference is the Trainer's
    own: it averages the first loss after a resume since the checkpoint, not since the last log;
    make `save_steps` a multiple of `logging_steps` to avoid it.

    `seconds` is the time from the beginning of each optimizer step to its end, all its
    micro-batches included: on CUDA the time of the device, elsewhere of the clock on the wall.
    `peak_memory_mb` is in MiB: on CUDA what this process allocated on its device since training
    began, elsewhere the resident memory of the process (where the system cannot reset that peak,
    since the process began).

    What goes wrong once steps are taken, a full disk say, is a warning: training goes on. A run
    whose log could not be written to its end stays "running" in `run.json`.

    Args:
        output_dir: directory of the files; by default `TrainingArguments.output_dir`.
        name: what people call the run; by default the name of the directory.
        extra: anything JSON can hold, kept in `run.json`; `extra["comparison"]` describes the
            run's part in a comparison.
        plot: draw the loss curve when training ends (needs the extra `report`).

    Raises:
        TypeError, ValueError: if JSON cannot hold `extra`.
        ImportError: if `plot` is set and matplotlib is not installed.
        OSError: where training begins, if the directory cannot be written to.
        ValueError: there, if the checkpoint that is resumed from is damaged.
    """

    def __init__(
        self,
        *,
        output_dir: str | None = None,
        name: str | None = None,
        extra: dict[str, Any] | None = None,
        plot: bool = True,
    ) -> None:
        if extra is not None and not isinstance(extra, dict):
            raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
        try:
            self.extra = json.loads(json.dumps(extra or {}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"extra must hold only what JSON can hold: {error}") from error
        if plot:
            check_matplotlib()  # a missing matplotlib is better known before training than after it
        self.output_dir = output_dir
        self.name = name
        self.plot = plot
        self.peak_memory_mb: float | None = None
        self._seconds, self._clock = 0.0, StepClock()
        self._spared = Sparing(type(self).__name__)
        self._log: TrainingLog | None = None
        self._info: dict[str, Any] = {}
        self._before_first_step = False

    @property
    def seconds(self) -> float:
        """Time that the steps took so far."""
        with self._spared(*_MEASURED):
            self._seconds = self._clock.read()
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds, self._clock = value, StepClock(value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the time and memory since the last row, which the log lacks."""
        return {
            "args": {
                "output_dir": self.output_dir,
                "name": self.name,
                "extra": self.extra,
                "plot": self.plot,
            },
            "attributes": {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: torch.nn.Module | None = kwargs.get("model")
        self._log = None
        self._spared = Sparing(type(self).__name__)
        stateful = cast(dict[str, Any], state.stateful_callbacks)
        saved = stateful.get(type(self).__name__)
        if saved is None:
            # The checkpoint resumed from was made without this callback, and the Trainer would
            # raise a KeyError at its next one.
            stateful[type(self).__name__] = self.state()
        if not state.is_world_process_zero:
            return
        if args.include_num_input_tokens_seen == "no":
            logger.warning(
                "ComparisonCallback cannot record tokens; pass "
                "include_num_input_tokens_seen='non_padding' to TrainingArguments"
            )
        trainer = calling_trainer(self)
        directory = self._directory(args)
        resumed = state.global_step > 0
        stale = () if resumed else (RUN_INFO, LOSS_CURVE)
        prepare_folder(directory, type(self).__name__, stale)
        rows = rows_to_keep(directory / TRAINING_LOG, state) if resumed else []
        earlier = [*rows]
        # A list would mean several callbacks of this class, and not say which of them is this one.
        if resumed and isinstance(saved, dict):
            validated(saved, _Saved, f"the checkpoint's callback {type(self).__name__}: ")
            earlier.append(saved["attributes"])
        self._clock = step_clock(
            args.device, max((row.get("seconds") or 0.0 for row in earlier), default=0.0)
        )
        self.peak_memory_mb = (
            max((row.get("peak_memory_mb") or 0.0 for row in earlier), default=0.0) or None
        )
        self._before_first_step = resumed
        reset_peak_memory(args.device)
        trainable, total = _parameter_counts(model)
        self._info = {
            "name": directory.resolve().name if self.name is None else self.name,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "max_steps": state.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "world_size": args.world_size,
            "runs_as": RunsAs.of(trainer).as_dict() if trainer else None,
            **describe_environment(args.device),
            "started": _started(directory) if resumed else _now(),
            "extra": self.extra,
        }
        self._log = TrainingLog(directory / TRAINING_LOG, rows)
        self._write_info(args, state, "running")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before_first_step = False
        if self._log is not None:
            with self._spared(*_MEASURED):
                self._clock.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._log is not None:
            with self._spared(*_MEASURED):
                self._clock.end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._log is None or self._before_first_step or logs is None:
            return
        row: Row | None = None
        with self._spared("row of what was logged", "The metrics are in the Trainer's own log."):
            row = row_of({**logs, "step": state.global_step})
        if row is None:
            return
        # The Trainer has waited for the device to know what it logs.
        with self._spared(*_MEASURED):
            row["seconds"] = round(self.seconds, 6)
            self._measure_memory(args.device)
            row["peak_memory_mb"] = self.peak_memory_mb
        with self._spared(f"new rows in {self._log.path}", "They follow once that works again."):
            self._log.append(row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._log is None:
            return
        log, folder = self._log, self._log.path.parent
        with self._spared(f"complete {log.path}", _AGAIN):
            log.flush()
        with self._spared(*_MEASURED):
            self._measure_memory(args.device)
        with self._spared(f"final {folder / RUN_INFO}", _AGAIN):
            # On SIGTERM the Trainer's just-in-time checkpoint ends training politely, to be
            # resumed.
            preempted = args.enable_jit_checkpoint and state.global_step < state.max_steps
            ended = not preempted and log.whole
            self._write_info(args, state, "completed" if ended else "running")
        if self.plot and log.rows:
            draw = "Draw it from the log with peft_svdinit.analysis.plot_loss_curve."
            with self._spared(str(folder / LOSS_CURVE), draw):
                plot_loss_curve(log.rows, folder / LOSS_CURVE, title=self._info["name"])
        self._log = None

    def _directory(self, args: TrainingArguments) -> Path:
        directory = args.output_dir if self.output_dir is None else self.output_dir
        assert directory is not None  # TrainingArguments fills its own in
        return Path(directory)

    def _measure_memory(self, device: torch.device) -> None:
        peak = peak_memory_mb(device)
        if peak is not None:
            self.peak_memory_mb = max(round(peak, 1), self.peak_memory_mb or 0.0)

    def _write_info(self, args: TrainingArguments, state: TrainerState, status: str) -> None:
        assert self._log is not None
        metrics = {
            name: value
            for row in self._log.rows
            for name, value in row.items()
            if name.startswith(EVAL_PREFIX) and value is not None
        }
        counted = args.include_num_input_tokens_seen != "no"
        write_run_info(
            self._log.path.parent,
            {
                "status": status,
                **self._info,
                "steps": state.global_step,
                "tokens": state.num_input_tokens_seen if counted else None,
                "seconds": round(self.seconds, 6),
                "peak_memory_mb": self.peak_memory_mb,
                "metrics": metrics,
                "finished": _now() if status == "completed" else None,
            },
        )


def _parameter_counts(model: torch.nn.Module | None) -> tuple[int, int]:
    """Trainable parameters and all of them."""
    if hasattr(model, "get_nb_trainable_parameters"):  # PEFT's knows how 4-bit weights are packed
        return model.get_nb_trainable_parameters()  # type: ignore
    return get_model_param_count(model, trainable_only=True), get_model_param_count(model)


def _started(directory: Path) -> str:
    """When the run that is resumed was started, or now if it left no record."""
    try:
        return read_run_info(directory)["started"]
    except ValueError:
        return _now()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
