"""LoriCalibrationCallback inside real Trainer runs: its scores, masks, resuming, and refusals."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from support.peft_fixtures import tiny_base, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_svdinit import LoriConfig
from peft_svdinit.masks import (
    MASK_FILE_NAME,
    SCORES_FILE_NAME,
    Selection,
    load_mask,
    load_scores,
    save_mask,
    save_scores,
    select,
)
from peft_svdinit.tuner import dense_factors
from trainer_callbacks import lori_calibration
from trainer_callbacks.lori_calibration import SCORES, LoriCalibrationCallback

STEPS = 6
ADAPTER: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def lori_d(**options: Any) -> Any:
    return get_peft_model(tiny_base(), LoriConfig(**{**ADAPTER, "lori_density": 1.0, **options}))


def trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any
) -> Trainer:
    set_seed(11)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=24, length=6, seed=3)]
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "seed": 11,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**defaults, **options})
    return Trainer(model or lori_d(), arguments, train_dataset=rows, callbacks=[*callbacks])


class Gradients(TrainerCallback):
    """Every B and its gradient in float64, as the optimizer is given them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def on_pre_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        self.steps.append(
            {
                name: (part.detach().double(), part.grad.double())
                for name, part in dense_factors(model).items()
                if part.grad is not None
            }
        )


def reference(score: str, seen: Gradients, model: Any) -> dict[str, torch.Tensor]:
    if score == "magnitude":
        return {name: part.detach().abs() for name, part in dense_factors(model).items()}
    found = {}
    for name in seen.steps[0]:
        pairs = [step[name] for step in seen.steps]
        if score == "gradient":
            found[name] = torch.stack([gradient for _, gradient in pairs]).sum(0).abs()
        else:
            found[name] = sum(((lora_B * gradient).abs() for lora_B, gradient in pairs))
    return found


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_definition_and_the_mask_is_chosen_by_them(tmp_path, score):
    seen = Gradients()
    calibration = LoriCalibrationCallback(density=0.25, floor=0.05, score=score)
    run = trainer(tmp_path, seen, calibration)
    run.train()
    scores, mask = load_scores(tmp_path), load_mask(tmp_path)
    expected = reference(score, seen, run.model)
    assert scores.scores.keys() == expected.keys() and len(seen.steps) == STEPS
    for name in expected:
        torch.testing.assert_close(
            scores.scores[name].double(), expected[name].double(), rtol=1e-5, atol=1e-9
        )
    chosen = select(scores.scores, Selection(0.25, floor=0.05))
    assert all(torch.equal(mask.masks[name], chosen[name]) for name in chosen)
    assert mask.source == {"kind": score, "steps": STEPS}
    sparse = LoriConfig(**ADAPTER, lori_density=0.25, lori_mask=str(tmp_path))
    trained, _ = get_peft_model(tiny_base(), sparse).get_nb_trainable_parameters()
    assert trained == mask.kept == round(0.25 * mask.size)


@pytest.mark.parametrize("score", SCORES)
def test_a_resumed_calibration_ends_with_the_same_scores(tmp_path, score):
    trainer(tmp_path / "whole", LoriCalibrationCallback(score=score, floor=0.01)).train()
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    callback = LoriCalibrationCallback(score=score, floor=0.01)
    with pytest.raises(Killed):
        trainer(tmp_path / "run", callback, Kill(), **saving).train()
    assert not (tmp_path / "run" / SCORES_FILE_NAME).exists()
    again = trainer(tmp_path / "run", LoriCalibrationCallback(score=score, floor=0.01), **saving)
    again.train(resume_from_checkpoint=True)
    whole, resumed = load_scores(tmp_path / "whole"), load_scores(tmp_path / "run")
    assert all(torch.equal(whole.scores[n], resumed.scores[n]) for n in whole.scores)
    masks = [load_mask(tmp_path / each).masks for each in ("whole", "run")]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_resuming_without_the_sums_of_the_checkpoint_is_refused(tmp_path):
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, **saving).train()
    last = str(tmp_path / "checkpoint-3")
    weighted = LoriCalibrationCallback(score="magnitude_gradient")
    with pytest.raises(RuntimeError, match=r"cannot go on from step 3: .* does not exist; start"):
        trainer(tmp_path, weighted, **saving).train(resume_from_checkpoint=last)
    sums = LoriCalibrationCallback(score="gradient", floor=0.01)
    other = tmp_path / "other"
    trainer(other, sums, **saving).train()
    with pytest.raises(RuntimeError, match=r"holds sums of .*'gradient'.* start again"):
        trainer(other, weighted, **saving).train(resume_from_checkpoint=str(other / "checkpoint-3"))


def test_training_ends_after_the_steps_asked_for(tmp_path):
    calibration = LoriCalibrationCallback(steps=2, floor=0.01, output_dir=tmp_path / "mask")
    run = trainer(tmp_path / "run", calibration)
    run.train()
    assert run.state.global_step == 2
    assert load_mask(tmp_path / "mask").source["steps"] == 2
    assert not (tmp_path / "run" / SCORES_FILE_NAME).exists()


def test_without_a_density_only_scores_are_written_from_which_any_mask_follows(tmp_path):
    trainer(tmp_path / "scores", LoriCalibrationCallback(density=None)).train()
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [SCORES_FILE_NAME]
    trainer(tmp_path / "mask", LoriCalibrationCallback(density=0.5)).train()
    later, once = (
        load_scores(tmp_path / "scores").mask(Selection(0.5)),
        load_mask(tmp_path / "mask"),
    )
    assert all(torch.equal(later.masks[name], once.masks[name]) for name in once.masks)
    assert later.seed == once.seed and later.source == once.source


def test_excluded_entries_are_not_taken(tmp_path):
    trainer(tmp_path / "first", LoriCalibrationCallback(density=0.5)).train()
    first = load_mask(tmp_path / "first")
    for exclude in (first, tmp_path / "first"):
        apart = LoriCalibrationCallback(density=0.25, floor=0.01, exclude=[exclude])
        trainer(tmp_path / "second", apart).train()
        second = load_mask(tmp_path / "second")
        assert second.kept == second.size // 4
        assert not any((first.masks[name] & second.masks[name]).any() for name in first.masks)


def test_from_an_adapter_magnitudes_are_how_far_B_moved(tmp_path):
    model = lori_d()
    first = trainer(tmp_path / "first", model=model)
    first.train()
    first.save_model()
    start = {name: part.detach().clone() for name, part in dense_factors(model).items()}
    model = lori_d(lori_start=str(tmp_path / "first"))
    trainer(tmp_path / "second", LoriCalibrationCallback(density=0.5), model=model).train()
    scores = load_scores(tmp_path / "second").scores
    for name, part in dense_factors(model).items():
        assert torch.equal(scores[name], (part.detach() - start[name]).abs())


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


def frozen() -> Any:
    model = lori_d()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_base, {}, "needs an adapter 'default' of a LoriConfig.*has no adapter"),
        (lambda: get_peft_model(tiny_base(), LoraConfig(**ADAPTER)), {}, "has default: LoraConfig"),
        (lambda: lori_d(lori_density=0.5), {}, r"B is sparse.*calibrate with LoriConfig\(lori_d"),
        (lori_d, {"adapter_name": "other"}, "needs an adapter 'other'"),
        (lori_d, {"steps": STEPS + 1}, "steps must be at most the 6 optimizer steps"),
        (lori_d, {"density": 0.4, "scope": "2:5"}, "a rank that 5 divides, got 4"),
        (lori_d, {"density": 0.0001}, "keeps none of the"),
    ],
)
def test_what_cannot_become_a_mask_is_refused_before_the_first_step(
    tmp_path, model, options, message
):
    steps = Steps()
    run = trainer(tmp_path, LoriCalibrationCallback(**options), steps, model=model())
    with pytest.raises(ValueError, match=message):
        run.train()
    assert steps.begun == 0


def test_a_frozen_B_is_refused(tmp_path):
    callback, model = LoriCalibrationCallback(), frozen()
    state: Any = SimpleNamespace(global_step=0, max_steps=STEPS)
    arguments: Any = trainer(tmp_path).args
    with pytest.raises(ValueError, match="lora_B is frozen"):
        callback.on_train_begin(arguments, state, SimpleNamespace(), model=model)  # pyright: ignore


def test_scaled_gradients_are_refused(tmp_path):
    Accelerator(cpu=True)
    state: Any = SimpleNamespace(global_step=0, max_steps=STEPS, is_world_process_zero=True)
    half: Any = SimpleNamespace(fp16=True, output_dir=str(tmp_path))
    for score in ("gradient", "magnitude_gradient"):
        callback = LoriCalibrationCallback(score=score)
        with pytest.raises(ValueError, match=f"score='{score}' needs gradients as they are"):
            callback.on_train_begin(half, state, SimpleNamespace(), model=lori_d())  # pyright: ignore
    magnitude = LoriCalibrationCallback()
    magnitude.on_train_begin(half, state, SimpleNamespace(), model=lori_d())  # pyright: ignore


@pytest.mark.parametrize("score", ["magnitude", "magnitude_gradient"])
def test_a_calibration_that_trained_nothing_leaves_no_mask(tmp_path, score, caplog):
    trainer(tmp_path, LoriCalibrationCallback(score=score)).train()
    run = trainer(tmp_path, LoriCalibrationCallback(score=score), learning_rate=0.0)
    run.train()
    assert f"no {SCORES_FILE_NAME} and {MASK_FILE_NAME} in {tmp_path} (ValueError" in caplog.text
    assert "lora_B is zero everywhere after the calibration" in caplog.text
    # Nor that of the earlier run.
    assert not (tmp_path / SCORES_FILE_NAME).exists() and not (tmp_path / MASK_FILE_NAME).exists()
    check_saved(run, tmp_path)


def check_saved(run: Trainer, folder: Path) -> None:
    """The Trainer saves the dense B, and PEFT reads it."""
    run.save_model(str(folder / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_base(), str(folder / "adapter"))
    trained = dense_factors(run.model)  # pyright: ignore[reportArgumentType]
    found = {name: part for name, part in loaded.named_parameters() if "lora_B" in name}
    assert len(found) == len(trained)
    assert all(
        torch.equal(part, next(found[each] for each in found if f".{name}." in each))
        for name, part in trained.items()
    )


def test_gradients_that_fail_on_the_way_leave_a_model_without_scores(tmp_path, monkeypatch, caplog):
    def lost(factors):
        raise RuntimeError("layer x: lora_B has no gradient")

    class Lose(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(lori_calibration, "gradients_of", lost)
            if state.global_step == 3:
                monkeypatch.undo()

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    run = trainer(tmp_path, Lose(), LoriCalibrationCallback(score="gradient"), **saving)
    run.train()
    assert run.state.global_step == STEPS
    assert "no sums of all gradients (RuntimeError: layer x" in caplog.text
    assert caplog.text.count("gradients of 3 of 4 steps") > 0  # the checkpoint
    assert f"{SCORES_FILE_NAME} and {MASK_FILE_NAME} in {tmp_path}" in caplog.text
    assert not list(tmp_path.rglob(SCORES_FILE_NAME))
    check_saved(run, tmp_path)

    monkeypatch.setattr(lori_calibration, "gradients_of", lost)
    first = trainer(tmp_path / "first", LoriCalibrationCallback(score="gradient"))
    with pytest.raises(RuntimeError, match="has no gradient"):
        first.train()
    assert first.state.global_step == 0


@pytest.mark.parametrize("broken", ["save_scores", "save_mask"])
def test_a_full_disk_at_the_end_costs_no_model_and_reaches_the_barrier(
    tmp_path, monkeypatch, caplog, broken
):
    reached = []

    class Fill(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            def full(*args, **kwargs):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(lori_calibration, broken, full)
            monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: reached.append(1))

    run = trainer(tmp_path, Fill(), LoriCalibrationCallback(floor=0.01))
    run.train()
    assert reached
    (record,) = [each for each in caplog.records if "No space left" in each.getMessage()]
    assert f"{MASK_FILE_NAME} in {tmp_path}" in record.getMessage() and record.exc_info
    assert (SCORES_FILE_NAME in record.getMessage()) is (broken == "save_scores")
    assert (tmp_path / SCORES_FILE_NAME).exists() is (broken == "save_mask")
    assert not (tmp_path / MASK_FILE_NAME).exists()
    check_saved(run, tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("taken")
    run = trainer(tmp_path, LoriCalibrationCallback(output_dir=tmp_path / "file" / "mask"))
    with pytest.raises(OSError, match="output_dir of LoriCalibrationCallback must be a writable"):
        run.train()
    assert run.state.global_step == 0


def test_a_calibration_that_diverged_leaves_no_mask(tmp_path, caplog):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model: Any = None, **kwargs):
            with torch.no_grad():
                next(iter(dense_factors(model).values())).fill_(torch.nan)

    run = trainer(tmp_path, Diverge(), LoriCalibrationCallback())
    run.train()
    assert "scores have NaN" in caplog.text and "diverged" in caplog.text
    assert not list(tmp_path.glob("lori_*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"scope": "model"}, "scope must be one of"),
        ({"score": "size"}, "score must be one of magnitude, magnitude_gradient, gradient"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"exclude": ["/nowhere/at/all"]}, "nowhere"),
        ({"exclude": "runs/mask"}, "exclude must be a list of masks, got 'runs/mask'"),
        ({"floor": 0.5}, r"floor must be in \[0, density=0.1\], got 0.5"),
        ({"density": None, "floor": 0.01}, "none is with density=None"),
    ],
)
def test_wrong_options_are_refused_when_the_callback_is_made(options, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        LoriCalibrationCallback(**options)


def test_a_file_of_scores_is_read_or_refused_in_words(tmp_path):
    trainer(tmp_path, LoriCalibrationCallback(density=0.5)).train()
    path = tmp_path / SCORES_FILE_NAME
    layers = load_scores(path)
    assert save_scores(tmp_path / "copy.safetensors", layers).read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated while copying"):
        load_scores(path)
    path.unlink()
    save_mask(path, load_mask(tmp_path))
    with pytest.raises(ValueError, match="holds no scores"):
        load_scores(path)
