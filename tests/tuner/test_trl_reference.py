"""The model that TRL's trainers take as the reference of an adapter with a start of its own."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.peft_fixtures import Scene, logits, make_scene
from support.word_tokenizer import tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = "bare base"


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("dpo"))


def first_loss(folder, **given: Any) -> float:
    """Of DPO: log 2 where the reference is the model that training begins with."""
    rows = [("w3 w4 w5", "w6 w7 w8", "w9 w9 w9"), ("w5 w6 w4", "w20 w21 w22", "w30 w31 w30")]
    columns = zip(*rows, strict=True)
    names = ("prompt", "chosen", "rejected")
    trainer = trl.DPOTrainer(
        args=trl.DPOConfig(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {name: list(column) for name, column in zip(names, columns, strict=True)}
        ),
        processing_class=tokenizer(),
        **given,
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_as_peft_config_a_delta_start_has_the_bare_base_as_its_reference(scene, tmp_path, caplog):
    loss = first_loss(tmp_path, model=scene.model(), peft_config=scene.config())
    assert abs(loss - math.log(2)) > 0.01
    assert len([record for record in caplog.records if WORDS in record.getMessage()]) == 1


@pytest.mark.parametrize("way", ["model", "ref_model", "reference", "subspace"])
def test_the_ways_that_have_the_start_as_reference_begin_at_log_2(scene, tmp_path, caplog, way):
    if way == "model":
        given: dict[str, Any] = {"model": get_peft_model(scene.model(), scene.config())}
    elif way == "ref_model":
        merged = get_peft_model(scene.model(), scene.config()).merge_and_unload()
        given = {"model": scene.model(), "peft_config": scene.config(), "ref_model": merged}
    else:
        given = {"model": scene.model(), "peft_config": scene.config(svd_start=way)}
    assert first_loss(tmp_path, **given) == pytest.approx(math.log(2), abs=1e-5)
    assert WORDS not in caplog.text


def test_nothing_is_said_where_nobody_trains(scene, caplog):
    caplog.set_level(logging.WARNING)
    model = scene.peft_model().eval()
    started = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(scene.base))
    model.train()
    model.add_adapter("other", scene.config(svd_start="subspace"))
    model.set_adapter("other")
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.merge_adapter()
    model.unmerge_adapter()
    assert (logits(model) - started).abs().max() < 1e-5
    model.merge_and_unload()
    assert WORDS not in caplog.text
