"""ComparisonCallback inside real Trainer runs: what it records, and that resuming loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import sys
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_svdinit.analysis import plot_loss_curve
from peft_svdinit.analysis.canvas import COLOURS
from peft_svdinit.analysis.runs.loss_curve import smoothed
from peft_svdinit.training import (
    LOSS_CURVE,
    RUN_INFO,
    TRAINING_LOG,
    log,
    memory,
    read_run,
    read_training_log,
)
from peft_svdinit.training.log import COLUMNS
from trainer_callbacks import comparison, step_clock
from trainer_callbacks.comparison import ComparisonCallback

LENGTH = 6
PADDING = 2
MEASURED = ("step", "epoch", "tokens", "loss", "learning_rate", "grad_norm", "eval_loss")


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def examples(count, seed=1) -> Any:
    """Sequences of `LENGTH` tokens, the last `PADDING` of them padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([1] * (LENGTH - PADDING) + [0] * PADDING)
    result = []
    for tokens in torch.randint(0, 64, (count, LENGTH), generator=generator):
        labels = tokens.masked_fill(mask == 0, -100)
        result.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return result


def make_trainer(
    output_dir,
    *callbacks,
    trainer_class: Any = Trainer,
    model: Any = None,
    eval_dataset: Any = None,
    **options: Any,
):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return trainer_class(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(output_dir), **(defaults | options)),
        train_dataset=examples(10),
        eval_dataset=examples(4, seed=2) if eval_dataset is None else eval_dataset,
        callbacks=list(callbacks),
    )


def measured(directory, *columns):
    """The rows without time and memory, in a form where NaN equals NaN."""
    rows = read_training_log(Path(directory) / TRAINING_LOG)
    return [repr([row.get(column) for column in columns or MEASURED]) for row in rows]


class Killed(Exception):
    """Ends a training as a kill does: without any further hook."""


class KillAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def counting_clock(monkeypatch):
    """A clock that ticks once per reading: every optimizer step then takes one second."""
    readings = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: float(next(readings)))
    monkeypatch.setattr(step_clock, "time", clock)


SCHEDULES: dict[str, dict[str, Any]] = {
    "every step": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
    "checkpoint on an evaluation": {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3},
    "sparse logs": {"logging_steps": 4, "save_steps": 3},
    "evaluation at the start": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "eval_on_start": True,
    },
    "epochs": {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "epoch",
        "max_steps": 15,
    },
    # The checkpoint of step 5 is written before the rows of step 5, which end the epoch.
    "rows after the checkpoint": {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_steps": 5,
        "max_steps": 15,
    },
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
    },
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_has_the_rows_and_seconds_of_an_uninterrupted_one(
    tmp_path, counting_clock, schedule
):
    options = {"save_strategy": "steps"} | SCHEDULES[schedule]
    # The Trainer averages the loss since the last log, after a resume only since the checkpoint.
    columns = [name for name in MEASURED if schedule != "sparse logs" or name != "loss"]
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        make_trainer(cut, ComparisonCallback(plot=False), KillAtStep(7), **options).train()
    before = read_training_log(cut / TRAINING_LOG)
    assert not read_run(cut).completed
    # What a writer that is killed in the middle of a line leaves behind.
    with open(cut / TRAINING_LOG, "a") as file:
        file.write("7,1.4,5")
    make_trainer(cut, ComparisonCallback(plot=False), **options).train(resume_from_checkpoint=True)

    assert measured(cut, *columns) == measured(tmp_path / "whole", *columns)
    assert len(read_training_log(cut / TRAINING_LOG)) > len(before) > 0
    for directory in (cut, tmp_path / "whole"):
        run = read_run(directory)
        assert run.completed
        # Evaluations and checkpoints took no time, and the steps repeated are counted once.
        assert all(row["seconds"] == row["step"] for row in run.log)
        assert run.info["seconds"] == run.info["steps"] == run.info["max_steps"]


def test_the_schedules_cover_an_evaluation_at_the_checkpoint_and_one_beside_it(tmp_path):
    make_trainer(
        tmp_path, ComparisonCallback(plot=False), **SCHEDULES["evaluation at the start"]
    ).train()
    rows = read_training_log(tmp_path / TRAINING_LOG)
    evaluated = [row["step"] for row in rows if row["eval_loss"] is not None]
    assert evaluated == [0, 2, 4, 6, 8]
    assert [row["step"] for row in rows if row["loss"] is not None] == list(range(1, 9))
    assert all((row["loss"] is None) != (row["eval_loss"] is None) for row in rows)


@pytest.mark.parametrize(
    ("eval_steps", "logged", "added"),
    [(3, [0, 3, 3, 6], []), (2, [0, 2, 3, 4, 6], [3])],
)
def test_a_start_evaluation_repeated_in_the_history_is_rebuilt_once(
    tmp_path, eval_steps, logged, added
):
    options = SCHEDULES["evaluation at the start"] | {"save_strategy": "steps"}
    options["eval_steps"] = eval_steps
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()
    cut = tmp_path / "cut"
    for kill_at, resume in ((4, False), (7, True)):
        with pytest.raises(Killed):
            make_trainer(cut, ComparisonCallback(plot=False), KillAtStep(kill_at), **options).train(
                resume_from_checkpoint=resume
            )
    # Without the log, the rows come from the checkpoint's history, where the Trainer repeated it.
    (cut / TRAINING_LOG).unlink()
    history = json.loads((cut / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == logged
    make_trainer(cut, ComparisonCallback(plot=False), **options).train(resume_from_checkpoint=True)
    whole = measured(tmp_path / "whole")
    extra = [row for row in measured(cut) if row not in whole]
    assert [json.loads(row.replace("None", "null"))[0] for row in extra] == added
    assert [row for row in measured(cut) if row in whole] == whole


def interrupted(directory, **options) -> dict[str, Any]:
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"} | options
    options |= {"eval_steps": 2}
    with pytest.raises(Killed):
        make_trainer(directory, ComparisonCallback(plot=False), KillAtStep(5), **options).train()
    return options


def test_resuming_into_another_directory_rebuilds_the_earlier_rows(tmp_path, counting_clock):
    options = interrupted(tmp_path / "first")
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    make_trainer(tmp_path / "second", ComparisonCallback(plot=False), **options).train(
        resume_from_checkpoint=checkpoint
    )
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()
    assert measured(tmp_path / "second") == measured(tmp_path / "whole")
    for row in read_training_log(tmp_path / "second" / TRAINING_LOG):
        if row["step"] <= 3:
            assert row["seconds"] is None and row["peak_memory_mb"] is None
        else:
            # The checkpoint carries the time of the steps before it.
            assert row["seconds"] == row["step"] and row["peak_memory_mb"] > 0


@pytest.mark.parametrize("spoil", ["another run", "a lost row", "no log at all"])
def test_a_log_that_is_not_the_checkpoints_is_rebuilt_with_a_warning(tmp_path, caplog, spoil):
    options = interrupted(tmp_path / "cut")
    log = tmp_path / "cut" / TRAINING_LOG
    lines = log.read_text().splitlines(keepends=True)
    if spoil == "another run":
        other = make_trainer(
            tmp_path / "other", ComparisonCallback(plot=False), **options | {"learning_rate": 1e-3}
        )
        other.train()
        shutil.copy(tmp_path / "other" / TRAINING_LOG, log)
    elif spoil == "a lost row":
        log.write_text("".join([lines[0], *lines[2:]]))
    else:
        log.write_text("not a log\n")
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        make_trainer(tmp_path / "cut", ComparisonCallback(plot=False), **options).train(
            resume_from_checkpoint=True
        )
    assert sum("rebuilt from" in message for message in caplog.messages) == 1
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")


def test_resuming_keeps_when_the_run_was_started(tmp_path):
    options = interrupted(tmp_path)
    info = json.loads((tmp_path / RUN_INFO).read_text())
    assert (info["status"], info["finished"]) == ("running", None)
    info["started"] = "2001-01-01T00:00:00+00:00"
    (tmp_path / RUN_INFO).write_text(json.dumps(info))
    make_trainer(tmp_path, ComparisonCallback(plot=False), **options).train(
        resume_from_checkpoint=True
    )
    run = read_run(tmp_path)
    assert run.info["started"] == "2001-01-01T00:00:00+00:00"
    assert run.info["finished"] > run.info["started"]


def test_restoring_callbacks_from_the_checkpoint_gives_the_same_rows(tmp_path, counting_clock):
    options = interrupted(tmp_path / "cut")
    make_trainer(
        tmp_path / "cut",
        ComparisonCallback(plot=False),
        restore_callback_states_from_checkpoint=True,
        **options,
    ).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    assert [row["seconds"] for row in read_run(tmp_path / "cut").log][-1] == 8
    assert read_run(tmp_path / "cut").completed


def test_a_checkpoint_made_without_the_callback_can_be_resumed_with_it(tmp_path, counting_clock):
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Killed):
        make_trainer(tmp_path, KillAtStep(4), **options).train()
    callback = ComparisonCallback(plot=False)
    callback.seconds = 1000.0  # left by an earlier training of the same object
    make_trainer(tmp_path, callback, **options).train(resume_from_checkpoint=True)
    rows = read_training_log(tmp_path / TRAINING_LOG)
    assert [row["step"] for row in rows] == list(range(1, 9))
    # The time of the first three steps is not known to anybody.
    assert [row["seconds"] for row in rows] == [None, None, None, 1, 2, 3, 4, 5]


def test_a_fresh_start_replaces_what_an_earlier_run_left(tmp_path):
    # With a row at step 0, which a resumed run would keep.
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10, "eval_on_start": True}
    make_trainer(tmp_path, ComparisonCallback(), **options).train()
    assert [row["step"] for row in read_run(tmp_path).log] == [0, *range(1, 9), 8]
    assert (tmp_path / LOSS_CURVE).exists()
    callback = ComparisonCallback(plot=False)
    make_trainer(tmp_path, callback, max_steps=3).train()
    assert not (tmp_path / LOSS_CURVE).exists()
    assert [row["step"] for row in read_run(tmp_path).log] == [1, 2, 3]
    assert read_run(tmp_path).info["steps"] == 3
    # One object can serve two trainings.
    make_trainer(tmp_path, callback, max_steps=2).train()
    assert [row["step"] for row in read_run(tmp_path).log] == [1, 2]


def test_seconds_and_memory_never_decrease_on_the_real_clock(tmp_path):
    options = interrupted(tmp_path)
    make_trainer(tmp_path, ComparisonCallback(plot=False), **options).train(
        resume_from_checkpoint=True
    )
    run = read_run(tmp_path)
    for column in ("seconds", "peak_memory_mb"):
        values = [row[column] for row in run.log]
        assert all(value > 0 for value in values)
        assert values == sorted(values)
        assert run.info[column] >= values[-1]
    by_step = {row["step"]: row["seconds"] for row in run.log}
    assert len(set(by_step.values())) == len(by_step)  # every step took some time


def test_the_rows_are_what_the_trainer_logged(tmp_path):
    trainer = make_trainer(
        tmp_path,
        ComparisonCallback(plot=False),
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    rows = read_training_log(tmp_path / TRAINING_LOG)
    *history, summary = trainer.state.log_history
    assert "train_runtime" in summary and "train_loss" in summary
    assert len(rows) == len(history) == 10
    assert set(rows[0]) == {*COLUMNS, "eval_loss"}
    for row, entry in zip(rows, history, strict=True):
        for column in ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss"):
            assert row[column] == entry.get(column)
    # Ten examples in batches of two, two batches a step: two steps of four and one of two.
    seen = [0]
    for step in range(8):
        seen.append(seen[-1] + (2 if step % 3 == 2 else 4) * (LENGTH - PADDING))
    assert [row["tokens"] for row in rows] == [seen[row["step"]] for row in rows]
    assert read_run(tmp_path).info["tokens"] == seen[8]


def test_all_tokens_are_counted_when_the_trainer_counts_all(tmp_path):
    make_trainer(
        tmp_path, ComparisonCallback(plot=False), include_num_input_tokens_seen="all", max_steps=2
    ).train()
    tokens = [row["tokens"] for row in read_training_log(tmp_path / TRAINING_LOG)]
    assert tokens == [2 * LENGTH, 4 * LENGTH]


def test_uncounted_tokens_are_empty_cells_and_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        make_trainer(
            tmp_path, ComparisonCallback(plot=False), include_num_input_tokens_seen="no"
        ).train()
    warnings = [text for text in caplog.messages if "include_num_input_tokens_seen" in text]
    assert len(warnings) == 1 and "non_padding" in warnings[0]
    run = read_run(tmp_path)
    assert len(run.log) == 8
    assert {row["tokens"] for row in run.log} == {run.info["tokens"]} == {None}


def test_run_json_describes_the_run(tmp_path):
    comparison_entry = {"method": "random", "learning_rate": 0.01}
    base = tiny_model()
    base_parameters = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(
        tmp_path,
        ComparisonCallback(
            output_dir=str(tmp_path / "run"), extra={"comparison": comparison_entry}, plot=False
        ),
        model=model,
        eval_strategy="steps",
        eval_steps=4,
        data_seed=11,
    )
    trainer.train()
    run = read_run(tmp_path / "run")
    assert run.completed and run.name == "run"
    assert run.info["extra"] == {"comparison": comparison_entry}
    assert (run.seed, run.info["data_seed"], run.info["world_size"]) == (5, 11, 1)
    assert run.info["trainable_parameters"] == 2 * (16 + 16)
    assert run.info["total_parameters"] == base_parameters + 2 * (16 + 16)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert run.info["metrics"] == {"eval_loss": evaluations[-1]["eval_loss"]}
    assert run.final_eval_loss == evaluations[-1]["eval_loss"]
    assert not (tmp_path / TRAINING_LOG).exists()


def test_several_evaluation_sets_get_a_column_each_as_they_appear(tmp_path):
    make_trainer(
        tmp_path,
        ComparisonCallback(plot=False),
        eval_dataset={"near": examples(2, seed=3), "far": examples(2, seed=4)},
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    ).train()
    rows = read_training_log(tmp_path / TRAINING_LOG)
    assert list(rows[0])[len(COLUMNS) :] == ["eval_near_loss", "eval_far_loss"]
    filled = [
        (row["step"], *(name for name in ("loss", "eval_near_loss", "eval_far_loss") if row[name]))
        for row in rows
    ]
    once = [(1, "loss"), (2, "loss"), (2, "eval_near_loss"), (2, "eval_far_loss")]
    assert filled == once + [(step + 2, name) for step, name in once]


def test_other_logs_and_evaluations_outside_of_training_are_not_rows(tmp_path):
    class LogsSomethingElse(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            callback.on_log(args, state, control, logs={"rank": 4, "reward": 1.0})
            metrics = {"eval_f1": 0.5, "eval_by_class": [1.0, 0.0], "eval_runtime": 3.0}
            callback.on_log(args, state, control, logs=metrics)

    callback = ComparisonCallback(plot=False)
    trainer = make_trainer(tmp_path, LogsSomethingElse(), callback, max_steps=2)
    trainer.evaluate()
    assert not (tmp_path / TRAINING_LOG).exists()
    trainer.train()
    content = (tmp_path / TRAINING_LOG).read_bytes()
    trainer.evaluate()
    assert (tmp_path / TRAINING_LOG).read_bytes() == content
    rows = read_training_log(tmp_path / TRAINING_LOG)
    assert [(row["step"], row["eval_f1"]) for row in rows] == [
        (1, 0.5),
        (1, None),
        (2, 0.5),
        (2, None),
    ]
    assert set(rows[0]) == {*COLUMNS, "eval_f1"}


def test_a_diverged_loss_is_nan_in_the_log_and_null_in_run_json(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    make_trainer(
        tmp_path,
        ComparisonCallback(),
        model=model,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_nan_inf_filter=False,
    ).train()
    rows = read_training_log(tmp_path / TRAINING_LOG)
    assert [repr(row["loss"]) for row in rows] == ["nan", "nan", "None"]
    assert repr(rows[2]["eval_loss"]) == "nan"
    info = json.loads((tmp_path / RUN_INFO).read_text(), parse_constant=pytest.fail)
    assert info["metrics"] == {"eval_loss": None}
    assert (tmp_path / LOSS_CURVE).exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path, caplog):
    class SecondProcess(Trainer):
        def is_world_process_zero(self):
            return False

    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "include_num_input_tokens_seen": "no",
    }
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        make_trainer(
            tmp_path / "run", ComparisonCallback(), trainer_class=SecondProcess, **options
        ).train()
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])
    assert not [record for record in caplog.records if record.name.startswith("trainer_callbacks")]
    make_trainer(tmp_path / "run", ComparisonCallback(), **options).train()
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {TRAINING_LOG, RUN_INFO, LOSS_CURVE}


class Reporter(TrainerCallback):
    """Stands for any integration of `report_to`."""

    def __init__(self):
        self.received = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        timings = ("runtime", "per_second")
        self.received.append({k: v for k, v in (logs or {}).items() if not k.endswith(timings)})


def test_other_reporters_receive_the_same_logs_before_and_after_it(tmp_path):
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
    alone, before, after = Reporter(), Reporter(), Reporter()
    make_trainer(tmp_path / "alone", alone, **options).train()
    make_trainer(
        tmp_path / "both", before, ComparisonCallback(plot=False), after, **options
    ).train()
    assert len(alone.received) == 11
    assert before.received == alone.received
    assert after.received == alone.received


def test_a_preempted_run_stays_running(tmp_path):
    class StopAtStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_training_stop = True

    for preemptible, completed in ((True, False), (False, True)):
        make_trainer(
            tmp_path,
            ComparisonCallback(plot=False),
            StopAtStep(),
            enable_jit_checkpoint=preemptible,
        ).train()
        run = read_run(tmp_path)
        assert run.completed is completed
        assert (run.info["steps"], run.info["max_steps"]) == (3, 8)
        assert (run.info["finished"] is not None) is completed
    make_trainer(tmp_path, ComparisonCallback(plot=False), enable_jit_checkpoint=True).train()
    assert read_run(tmp_path).completed


class FullDisk(TrainerCallback):
    """From one step to another nothing can be written to a log; the last write is cut short."""

    def __init__(self, monkeypatch, first, last):
        self.monkeypatch, self.first, self.last = monkeypatch, first, last

    def on_step_begin(self, args, state, control, **kwargs):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        def torn(path, *args, **kwargs):
            with open(path, "a") as file:
                file.write("3,0.")
            full()

        if state.global_step == self.first:
            self.monkeypatch.setattr(log, "open", torn, raising=False)
            self.monkeypatch.setattr(log, "replacing", full)
        if state.global_step == self.last:
            self.monkeypatch.undo()


def saved_adapter(trainer, folder):
    """The adapter as stock PEFT reads what the Trainer saves, and as it was trained."""
    trainer.save_model(str(folder))
    loaded = PeftModel.from_pretrained(tiny_model(), str(folder))
    return get_peft_model_state_dict(loaded), get_peft_model_state_dict(trainer.model)


def adapted():
    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("last", [5, 100])
def test_a_full_disk_costs_no_model_and_no_row_once_there_is_room(
    tmp_path, monkeypatch, caplog, last
):
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}
    make_trainer(tmp_path / "whole", ComparisonCallback(plot=False), **options).train()
    callback = ComparisonCallback(plot=False, output_dir=str(tmp_path / "run"))
    disk = FullDisk(monkeypatch, 2, last)
    trainer = make_trainer(tmp_path, disk, callback, model=adapted(), **options)
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        assert trainer.train().global_step == 8
    monkeypatch.undo()
    texts = [record for record in caplog.records if "ComparisonCallback" in record.getMessage()]
    assert all("No space left" in each.getMessage() and each.exc_info for each in texts)
    assert len(texts) == (1 if last == 5 else 2)
    assert all(f"{tmp_path / 'run' / TRAINING_LOG} (OSError" in each.getMessage() for each in texts)
    loaded, trained = saved_adapter(trainer, tmp_path / "adapter")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], trained[key]) for key in loaded)
    assert json.loads((tmp_path / "run" / RUN_INFO).read_text())["status"] == (
        "completed" if last == 5 else "running"
    )
    if last == 5:
        whole = measured(tmp_path / "whole", "step", "epoch", "tokens")
        assert measured(tmp_path / "run", "step", "epoch", "tokens") == whole


@pytest.mark.parametrize("broken", ["write_run_info", "plot_loss_curve", "peak_memory_mb"])
def test_what_fails_at_the_end_costs_its_own_file_alone(tmp_path, monkeypatch, caplog, broken):
    class Break(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            def fail(*args, **kwargs):
                raise RuntimeError("broken")

            monkeypatch.setattr(comparison, broken, fail)

    trainer = make_trainer(tmp_path, Break(), ComparisonCallback(), model=adapted(), max_steps=2)
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        trainer.train()
    (record,) = [each for each in caplog.records if "broken" in each.getMessage()]
    named = {
        "write_run_info": f"no final {tmp_path / RUN_INFO}",
        "plot_loss_curve": f"no {tmp_path / LOSS_CURVE}",
        "peak_memory_mb": "no seconds and memory",
    }
    assert named[broken] in record.getMessage() and record.exc_info
    assert (tmp_path / LOSS_CURVE).exists() is (broken != "plot_loss_curve")
    assert read_run(tmp_path).completed is (broken != "write_run_info")
    assert len(read_run(tmp_path).log) == 2
    loaded, trained = saved_adapter(trainer, tmp_path / "adapter")
    assert all(torch.equal(loaded[key], trained[key]) for key in loaded)


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        (["comparison"], TypeError),
        ({"tensor": torch.ones(1)}, TypeError),
        ({"loss": math.nan}, ValueError),
    ],
)
def test_an_extra_that_json_cannot_hold_is_refused_at_once(extra, error):
    with pytest.raises(error, match="extra must"):
        ComparisonCallback(extra=extra, plot=False)


def test_an_unwritable_directory_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("taken")
    callback = ComparisonCallback(output_dir=str(tmp_path / "file" / "run"), plot=False)
    trainer = make_trainer(tmp_path / "trainer", callback)
    with pytest.raises(OSError, match="output_dir of ComparisonCallback must be a writable"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert (tmp_path / "file").read_text() == "taken"


def test_a_missing_matplotlib_is_reported_before_training_and_can_be_declined(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"peft-svdinit\[report\].*plot=False"):
        ComparisonCallback()
    ComparisonCallback(plot=False)


def test_the_picture_is_a_png_with_both_curves_and_the_evaluations(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    make_trainer(
        tmp_path, ComparisonCallback(name="tiny"), eval_strategy="steps", eval_steps=2
    ).train()
    picture = imread(tmp_path / LOSS_CURVE)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    rows = read_training_log(tmp_path / TRAINING_LOG)

    def pixels(path, colour):
        wanted = torch.tensor(to_rgb(colour))
        image = torch.from_numpy(imread(path)[..., :3].copy())
        return int(((image - wanted).abs().amax(-1) < 0.02).sum())

    train_only = tmp_path / "train.png"
    plot_loss_curve([row for row in rows if row["loss"] is not None], train_only)
    for colour in (COLOURS[5], COLOURS[0]):
        assert pixels(tmp_path / LOSS_CURVE, colour) > 100
        assert pixels(train_only, colour) > 100
    assert pixels(tmp_path / LOSS_CURVE, COLOURS[3]) > 100
    assert pixels(train_only, COLOURS[3]) == 0


def test_smoothing_keeps_constants_and_survives_an_overflow():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0], decay=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])
    assert smoothed([1.0, math.inf, math.nan]) == pytest.approx([1.0] * 3)
    assert math.isnan(smoothed([math.nan])[0])


def test_peak_memory_counts_from_the_reset():
    cpu = torch.device("cpu")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system cannot reset the peak memory of a process")
    memory.reset_peak_memory(cpu)
    start = memory.peak_memory_mb(cpu)
    with mmap(-1, 100 * 2**20) as large:  # a tensor's pages may stay with malloc
        large.write(b"1" * len(large))
    high = memory.peak_memory_mb(cpu)
    memory.reset_peak_memory(cpu)
    after = memory.peak_memory_mb(cpu)
    assert start is not None and high is not None and after is not None
    assert high - start > 90
    assert high - after > 90


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_peak_is_what_this_process_allocated_on_the_device(tmp_path):
    large = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    del large
    make_trainer(tmp_path, ComparisonCallback(plot=False), use_cpu=False).train()
    run = read_run(tmp_path)
    assert run.info["hardware"]["device"] == torch.cuda.get_device_name()
    assert run.info["peak_memory_mb"] == round(torch.cuda.max_memory_allocated() / 2**20, 1)
    assert 0 < run.info["peak_memory_mb"] < 1024
