"""TRL hands a config through to PEFT: SFTTrainer(peft_config=...)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from support.peft_fixtures import (
    HELD_RANK,
    Scene,
    adapter_weights,
    aliased,
    equal_bits,
    logits,
    make_scene,
    tokens,
)
from support.word_tokenizer import sft_arguments, tokenizer

from peft_svdinit import SvdLoraConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("trl"))


def sft_trainer(scene: Scene, folder, peft_config: LoraConfig):
    texts = [" ".join(f"w{index}" for index in row) for row in tokens(8, 6).tolist()]
    arguments = sft_arguments(trl, folder, gradient_checkpointing=False)
    return trl.SFTTrainer(
        model=scene.model(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("start", ["delta", "reference"])
def test_sft_trainer_starts_trains_and_saves(scene, tmp_path, start):
    trainer = sft_trainer(scene, tmp_path, scene.config(svd_start=start))
    expected = scene.peft_model(svd_start=start)
    initial = adapter_weights(trainer.model)
    assert equal_bits(initial, adapter_weights(expected))
    assert torch.equal(logits(trainer.model), logits(expected))
    trainer.train()
    assert not equal_bits(adapter_weights(trainer.model), initial)
    trainer.save_model(str(tmp_path / "saved"))
    assert type(LoraConfig.from_pretrained(str(tmp_path / "saved"))) is LoraConfig
    assert SvdLoraConfig.from_pretrained(str(tmp_path / "saved")).svd_start == start


def test_a_tool_that_passes_only_a_string_reaches_the_start(scene, tmp_path):
    config = aliased(
        str(scene.file),
        r=HELD_RANK,
        lora_alpha=2 * HELD_RANK,
        target_modules=scene.targets,
        task_type="CAUSAL_LM",
    )
    trainer = sft_trainer(scene, tmp_path, config)
    assert equal_bits(adapter_weights(trainer.model), adapter_weights(scene.peft_model()))
