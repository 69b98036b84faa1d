"""Training with transformers' Trainer: an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.interruption import INTERRUPTED_AT, STEPS, StopAt, losses
from support.peft_fixtures import (
    Scene,
    adapter_weights,
    equal_bits,
    logits,
    make_scene,
    tokens,
    write_factors,
)
from transformers import Trainer, TrainingArguments, set_seed


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("resume"))


def trainer(scene: Scene, folder: Path, callbacks: list | None = None, **options: Any) -> Any:
    set_seed(11)
    model = scene.peft_model(lora_dropout=0.2, **options)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=24, length=6, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=INTERRUPTED_AT,
        logging_steps=1,
        seed=11,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize(
    "options",
    [
        {"svd_start": "subspace"},
        {"svd_start": "reference", "svd_split": "balanced", "rank_pattern": {"q_proj": 3}},
        {"svd_start": "delta", "use_dora": True},
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(scene, tmp_path, options):
    whole = trainer(scene, tmp_path / "whole", **options)
    initial = adapter_weights(whole.model)
    whole.train()

    first = trainer(scene, tmp_path / "parts", [StopAt(INTERRUPTED_AT)], **options)
    assert equal_bits(adapter_weights(first.model), initial)
    first.train()
    resumed = trainer(scene, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == STEPS
    assert losses(resumed) == losses(whole)
    assert equal_bits(adapter_weights(resumed.model), adapter_weights(whole.model))
    assert not equal_bits(adapter_weights(whole.model), initial)
    saved = [tmp_path / part / f"checkpoint-{STEPS}" for part in ("whole", "parts")]
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in saved)
    assert one == other


def test_resuming_with_other_factors_is_refused(scene, tmp_path):
    """A reference is part of the function; the checkpoint tells which one it was trained with."""
    options: dict[str, Any] = {"svd_start": "reference"}
    trainer(scene, tmp_path / "run", [StopAt(INTERRUPTED_AT)], **options).train()
    others = {
        name: type(layer)(layer.U.flip(0), layer.S, layer.Vh, layer.norm)
        for name, layer in scene.factors.items()
    }
    file = write_factors(tmp_path / "others.safetensors", scene.base, others)
    resumed = trainer(scene, tmp_path / "run", svd_factors=str(file), **options)
    with pytest.raises(ValueError, match="other factors than svd_factors"):
        resumed.train(resume_from_checkpoint=True)


def test_a_bf16_base_resumes_too(scene, tmp_path):
    """PEFT widens the adapter when the Trainer loads it, which must not start it again."""
    half = Scene(scene.architecture, scene.model().to(torch.bfloat16), scene.factors, scene.file)
    runs = {}
    for name in ("whole", "parts"):
        stop = [StopAt(INTERRUPTED_AT)] if name == "parts" else None
        run = trainer(half, tmp_path / name, stop, svd_start="reference")
        run.train()
        runs[name] = run
    resumed = trainer(half, tmp_path / "parts", svd_start="reference")
    resumed.train(resume_from_checkpoint=True)
    assert equal_bits(adapter_weights(resumed.model), adapter_weights(runs["whole"].model))


def test_two_trainers_with_one_seed_are_equal_bit_for_bit(scene, tmp_path):
    runs, initial = [], []
    for name in "ab":
        runs.append(trainer(scene, tmp_path / name, svd_start="reference"))
        initial.append(adapter_weights(runs[-1].model))
        runs[-1].train()
    assert equal_bits(*initial)
    assert losses(runs[0]) == losses(runs[1])
    assert equal_bits(*(adapter_weights(run.model) for run in runs))


def test_the_optimizer_holds_exactly_the_adapter(scene, tmp_path):
    run = trainer(scene, tmp_path, [StopAt(1)], svd_start="reference")
    run.train()
    held = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
    live = {id(weight) for name, weight in run.model.named_parameters() if "lora_" in name}
    assert held == live
    assert torch.isfinite(logits(run.model)).all()


def test_checkpoints_hold_the_adapter_in_safetensors(scene, tmp_path):
    run = trainer(scene, tmp_path, [StopAt(INTERRUPTED_AT)], svd_start="reference")
    run.train()
    names = {path.name for path in (tmp_path / f"checkpoint-{INTERRUPTED_AT}").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "svdinit_config.json"} <= names
    assert "adapter_model.bin" not in names
