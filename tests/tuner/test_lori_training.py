"""LoRI in transformers' Trainer and what stands around it: resume, quantised bases, TRL."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.interruption import INTERRUPTED_AT, STEPS, StopAt, losses
from support.lori_fixtures import (
    factors,
    lori_config,
    lori_model,
    off_mask,
    reloaded,
    same_bits,
    sparse_factors,
    trained_names,
)
from support.peft_fixtures import adapter_weights, equal_bits, logits, tiny_base, tokens, train
from support.quantised import KINDS, quantised
from support.word_tokenizer import sft_arguments, tokenizer
from transformers import Trainer, TrainingArguments, set_seed

from peft_svdinit import LoriConfig


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """An adapter of a calibration run: B is dense, over the A of seed 0."""
    model = lori_model(lori_density=1.0)
    train(model, learning_rate=0.05)
    folder = tmp_path_factory.mktemp("calibrated")
    model.save_pretrained(str(folder))
    return folder


def trainer(folder: Path, callbacks: list | None = None, model: Any = None, **options: Any) -> Any:
    set_seed(11)
    model = model or lori_model(lora_dropout=0.2, **options)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=48, length=6, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        learning_rate=1e-2,
        weight_decay=0.3,
        save_steps=INTERRUPTED_AT,
        logging_steps=1,
        seed=11,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


def optimizer_numbers(state: dict[str, Any]) -> list[int]:
    """Sizes of the moments of every parameter, in an optimizer's state dict."""
    return [entry["exp_avg"].numel() for entry in state["state"].values()]


@pytest.mark.parametrize("kind", ["rows", "start", "dora", "dense"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, calibrated, kind):
    options: dict[str, Any] = {
        "rows": {"lori_scope": "row", "lori_seed": 2, "rank_pattern": {"q_proj": 4}},
        "start": {"lori_start": calibrated},
        "dora": {"use_dora": True},
        "dense": {"lori_density": 1.0},
    }[kind]
    whole = trainer(tmp_path / "whole", **options)
    initial = adapter_weights(whole.model)
    before = {} if kind == "dense" else off_mask(whole.model)
    whole.train()

    first = trainer(tmp_path / "parts", [StopAt(INTERRUPTED_AT)], **options)
    assert equal_bits(adapter_weights(first.model), initial)
    first.train()
    resumed = trainer(tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == STEPS
    assert losses(resumed) == losses(whole)
    assert equal_bits(adapter_weights(resumed.model), adapter_weights(whole.model))
    after = adapter_weights(whole.model)
    assert {n for n in after if not torch.equal(after[n], initial[n])} == set(
        trained_names(whole.model)
    )
    for model in (whole.model, resumed.model):
        rest = {} if kind == "dense" else off_mask(model)
        assert all(same_bits(rest[name], before[name]) for name in before)
    if kind == "start":
        assert all(rest.any() for rest in before.values())
    one, other = (
        (tmp_path / part / f"checkpoint-{STEPS}" / "adapter_model.safetensors").read_bytes()
        for part in ("whole", "parts")
    )
    assert one == other


def test_the_optimizer_and_its_checkpoint_hold_the_trained_entries_alone(tmp_path):
    run = trainer(tmp_path, [StopAt(INTERRUPTED_AT)])
    run.train()
    sizes = [len(factor.values) for factor in sparse_factors(run.model).values()]
    checkpoint = tmp_path / f"checkpoint-{INTERRUPTED_AT}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for state in (run.optimizer.state_dict(), saved):
        assert sorted(optimizer_numbers(state)) == sorted(sizes)
    # Weight decay is on, and clipping sees the trained entries alone.
    assert {group["weight_decay"] for group in run.optimizer.param_groups if group["params"]} == {
        0.3
    }
    held = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
    assert held == {id(run.model.get_parameter(name)) for name in trained_names(run.model)}
    size = sum(sizes) * 4
    content = (checkpoint / "optimizer.pt").stat().st_size
    assert 2 * size < content < 2 * size + 20_000


def test_a_checkpoint_is_a_stock_adapter_with_its_mask(tmp_path):
    run = trainer(tmp_path, [StopAt(INTERRUPTED_AT)])
    run.train()
    checkpoint = tmp_path / f"checkpoint-{INTERRUPTED_AT}"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "svdinit_config.json", "lori_mask.safetensors"} <= names
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    expected = logits(run.model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), str(checkpoint))), expected)
    assert torch.equal(logits(reloaded(checkpoint)), expected)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lori_seed": 3}, "another A than this model.*lori_seed"),
        ({"lori_density": 0.1}, "other entries off the mask"),
        ({"lori_scope": "row"}, "other entries off the mask"),
    ],
)
def test_resuming_with_another_configuration_is_refused(tmp_path, options, names):
    trainer(tmp_path, [StopAt(INTERRUPTED_AT)]).train()
    with pytest.raises(ValueError, match=names):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_resuming_with_another_start_is_refused(tmp_path, calibrated):
    trainer(tmp_path, [StopAt(INTERRUPTED_AT)], lori_start=calibrated).train()
    with pytest.raises(ValueError, match=r"other entries off the mask.*lori_start"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_bf16_base_resumes_too(tmp_path, calibrated):
    base = tiny_base()
    torch.nn.Module.to(base, torch.bfloat16)
    runs = {}
    for name, stop in (("whole", []), ("parts", [StopAt(INTERRUPTED_AT)])):
        model = lori_model(copy.deepcopy(base), lori_start=calibrated)
        runs[name] = trainer(tmp_path / name, stop, model=model)
        runs[name].train()
    model = lori_model(copy.deepcopy(base), lori_start=calibrated)
    resumed = trainer(tmp_path / "parts", model=model)
    resumed.train(resume_from_checkpoint=True)
    assert equal_bits(adapter_weights(resumed.model), adapter_weights(runs["whole"].model))


# Quantised bases


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    try:
        logits(quantised(tiny_base(), request.param))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no {request.param} on this CPU: {error}")
    return request.param


def test_over_a_quantised_base_it_trains_saves_and_goes_on(tmp_path, kind):
    base = prepare_model_for_kbit_training(
        quantised(tiny_base(), kind), use_gradient_checkpointing=False
    )
    expected = logits(base)
    model = get_peft_model(base, lori_config())
    assert (logits(model) - expected).abs().max() < 1e-5
    train(model, learning_rate=0.05)
    assert all(factor.values.all() for factor in sparse_factors(model).values())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(str(tmp_path))
    again = reloaded(tmp_path, quantised(tiny_base(), kind), is_trainable=True)
    assert equal_bits(adapter_weights(again), adapter_weights(model))
    assert (logits(again) - logits(model)).abs().max() < 1e-5
    stock = PeftModel.from_pretrained(quantised(tiny_base(), kind), str(tmp_path))
    assert torch.equal(logits(stock), logits(again))
    train(again)
    assert all(not rest.any() for rest in off_mask(again).values())


def test_over_a_quantised_base_dora_trains(kind):
    if kind == "8bit":
        pytest.skip("on the CPU, PEFT's own DoRA takes an 8-bit layer's scales away")
    model = get_peft_model(quantised(tiny_base(), kind), lori_config(use_dora=True))
    before = logits(model)
    assert torch.tensor(train(model)).isfinite().all()
    assert not torch.equal(logits(model), before)
    assert trained_names(model)[0].endswith("values")


def test_merging_into_a_quantised_base_adds_the_update_within_its_rounding(kind):
    model = get_peft_model(quantised(tiny_base(), kind), lori_config())
    untrained = logits(model)
    train(model, learning_rate=0.1, steps=5)
    trained = logits(model)
    merged = logits(model.merge_and_unload())
    assert (merged - trained).norm() < 0.5 * (trained - untrained).norm()


# TRL


@pytest.mark.parametrize("by_string", [False, True])
def test_sft_trainer_makes_trains_and_saves_it(tmp_path, by_string):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [" ".join(f"w{index}" for index in row) for row in tokens(8, 6).tolist()]
    arguments = sft_arguments(trl, tmp_path)
    config: Any = lori_config(lori_density=0.1)
    if by_string:
        options: Any = {"init_lora_weights": "lori", "target_modules": config.target_modules}
        config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **options)
    run = trl.SFTTrainer(
        model=tiny_base(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=config,
    )
    expected = lori_model(lori_density=0.1)
    initial = adapter_weights(run.model)
    assert equal_bits(initial, adapter_weights(expected))
    assert trained_names(run.model) == trained_names(expected)
    run.train()
    moved = adapter_weights(run.model)
    assert {n for n in moved if not torch.equal(moved[n], initial[n])} == set(
        trained_names(run.model)
    )
    run.save_model(str(tmp_path / "saved"))
    assert type(LoraConfig.from_pretrained(str(tmp_path / "saved"))) is LoraConfig
    assert LoriConfig.from_pretrained(str(tmp_path / "saved")).lori_density == 0.1
    again = reloaded(tmp_path / "saved")
    for name, pair in factors(run.model).items():
        assert all(map(torch.equal, pair, factors(again)[name]))
