"""Whatever goes wrong in a callback when training ends, the model is there to be saved."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from support.peft_fixtures import tiny_base, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import trainer_callbacks
from peft_svdinit import LoriConfig
from trainer_callbacks.adam_moments import CarryMomentsCallback, SaveMomentsCallback
from trainer_callbacks.comparison import ComparisonCallback
from trainer_callbacks.lori_calibration import LoriCalibrationCallback
from trainer_callbacks.sparing import Sparing

ADAPTER: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}


def lora() -> Any:
    set_seed(0)
    return get_peft_model(tiny_base(), LoraConfig(**ADAPTER))


def lori() -> Any:
    return get_peft_model(tiny_base(), LoriConfig(**ADAPTER, lori_density=1.0))


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any) -> Trainer:
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=6, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks])


def carrying(folder: Path) -> CarryMomentsCallback:
    run = trainer(folder / "teacher", SaveMomentsCallback(), model=lora())
    run.train()
    run.save_model()
    return CarryMomentsCallback(str(folder / "teacher"))


def student_of(folder: Path) -> Any:
    model = lora()
    weights = load_peft_weights(str(folder / "teacher"), device="cpu")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[key.replace(".default.", ".")])
    return model


# Each with a model that it can be used on, and the files that it leaves.
CALLBACKS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "CarryMomentsCallback": (carrying, student_of, ()),
    "ComparisonCallback": (
        lambda folder: ComparisonCallback(),
        lambda folder: lora(),
        ("training_log.csv", "run.json", "loss_curve.png"),
    ),
    "LoriCalibrationCallback": (
        lambda folder: LoriCalibrationCallback(score="gradient", floor=0.01),
        lambda folder: lori(),
        ("lori_scores.safetensors", "lori_mask.safetensors"),
    ),
    "SaveMomentsCallback": (
        lambda folder: SaveMomentsCallback(),
        lambda folder: lora(),
        ("adam_moments.safetensors",),
    ),
}


class TakeAway(TrainerCallback):
    """Puts a file where the folder was, once: from then on nothing can be written there."""

    def __init__(self, folder: Path, at_step: int) -> None:
        self.folder, self.at_step = folder, at_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            shutil.rmtree(self.folder)
            self.folder.write_text("taken")


def test_every_exported_callback_that_writes_is_covered():
    exported = {name: getattr(trainer_callbacks, name) for name in trainer_callbacks.__all__}
    callbacks = {name for name, kind in exported.items() if issubclass(kind, TrainerCallback)}
    assert set(CALLBACKS) == callbacks - {
        "LowRankCheckpointsCallback",
        "RankSwitchCallback",
        "RunsAsCallback",
    }


@pytest.mark.parametrize("at_step", [1, 3])
@pytest.mark.parametrize("name", CALLBACKS)
def test_training_ends_well_without_a_place_to_write_to(tmp_path, caplog, name, at_step):
    make, model, files = CALLBACKS[name]
    out = tmp_path / "out"
    callback = make(tmp_path)
    run = trainer(out, TakeAway(out, at_step), callback, model=model(tmp_path))
    with caplog.at_level(logging.WARNING, logger="trainer_callbacks"):
        assert run.train().global_step == 3
    messages = [each.getMessage() for each in caplog.records if each.exc_info]
    assert all(any(file in text for text in messages) for file in files)
    assert len(messages) == len(set(messages)) <= len(files) + 1
    run.save_model(str(tmp_path / "adapter"))
    saved = load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    trained = get_peft_model_state_dict(run.model)
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[key], trained[key].cpu()) for key in saved)


def test_a_failure_is_told_once_with_its_traceback_and_a_kill_passes(caplog):
    spared = Sparing("Owner")
    for _ in range(3):
        with spared("this file", "Do that."):
            raise TypeError("a mistake in the program")
    with spared("another file", "Do that."):
        pass
    assert spared.missing == ["this file"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "Owner leaves no this file (TypeError: a mistake in the program); the training is not "
        "affected. Do that."
    )
    assert record.exc_info and record.exc_info[0] is TypeError
    with pytest.raises(KeyboardInterrupt), spared("this file", "Do that."):
        raise KeyboardInterrupt
