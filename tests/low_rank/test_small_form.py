"""Low-rank models in folders without dense weights, which transformers loads if it is told how."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_fixtures import tokens
from support.small_forms import low_rank, registered_small_form, unregister_small_form
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from peft_svdinit.low_rank import (
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    densify_,
    factorize_,
    is_low_rank,
    low_rank_layers,
    make_plan,
    register_small_form,
    save_small_form,
    shrink_,
)
from peft_svdinit.low_rank.small_form import METHOD

LAYER = "model.layers.1.mlp.up_proj"
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with registered_small_form():
        yield


def loaded(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a folder, of which every tensor must have a place."""
    model, info = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_loaded_small_form_is_the_model_that_was_saved(tmp_path, architecture, norms, sharded):
    model = low_rank(architecture, norms=norms, tie_word_embeddings=sharded)
    model.generation_config.max_new_tokens = 7  # pyright: ignore[reportOptionalMemberAccess]
    save_small_form(model, tmp_path, max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    found = loaded(tmp_path)
    assert_same(found, model)
    assert torch.equal(logits(found), logits(model))
    assert low_rank_layers(found).keys() == low_rank_layers(model).keys()
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert found.generation_config.max_new_tokens == 7


def test_what_is_stored_is_the_factors_and_no_dense_weight(tmp_path):
    model = low_rank()
    save_small_form(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    in_place = {f"{name}.weight" for name in low_rank_layers(model)}
    assert found.keys() == model.state_dict().keys() | in_place
    assert {tuple(found[key].shape) for key in in_place} == {(1,)}


def test_a_model_in_bfloat16_and_one_read_as_bfloat16_have_the_same_weights(tmp_path):
    model = low_rank(dtype=torch.bfloat16)
    save_small_form(model, tmp_path / "bf16")
    assert_same(loaded(tmp_path / "bf16"), model)
    model = low_rank()
    save_small_form(model, tmp_path / "float32")
    as_asked = loaded(tmp_path / "float32", dtype=torch.bfloat16)
    assert_same(as_asked, loaded(tmp_path / "float32").to(torch.bfloat16))
    assert_same(as_asked, loaded(tmp_path / "float32").bfloat16())
    assert logits(as_asked).dtype == torch.bfloat16


def test_the_model_that_is_saved_stays_as_it_is(tmp_path, monkeypatch):
    model = low_rank()
    config, before = model.config, copy.deepcopy(model.config.to_dict())
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_small_form(model, tmp_path)
    assert model.config is config and model.config.to_dict() == before
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    monkeypatch.setattr(type(model), "save_pretrained", lambda *others, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_small_form(model, tmp_path)
    assert model.config is config


def test_without_registration_the_folder_is_refused_and_importing_registers_nothing(tmp_path):
    model = low_rank("gpt2", norms=True)
    save_small_form(model, tmp_path / "small")
    save_file({"logits": logits(model)}, tmp_path / "expected.safetensors")
    script = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder = {str(tmp_path / "small")!r}
def refused():
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        return "ignore_mismatched_sizes" in str(error)
assert "peft_svdinit" not in sys.modules and refused()
from peft_svdinit.low_rank import LowRankLinear, register_small_form, save_small_form
assert refused()
register_small_form()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.arange(12).reshape(2, 6)
expected = load_file({str(tmp_path / "expected.safetensors")!r})["logits"]
assert torch.equal(model(ids).logits, expected)
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr
    # What transformers says of a method that it does not know, and of the weights.
    assert METHOD in done.stderr and "mlp.c_fc.weight" in done.stderr, done.stderr


def test_a_second_registration_changes_nothing_and_a_taken_name_is_refused(monkeypatch):
    before = AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD]
    register_small_form()
    assert (AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD]) == before
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, object)
    with pytest.raises(ValueError, match="already registered"):
        register_small_form()


def test_a_loaded_model_counts_as_an_ordinary_one(tmp_path):
    save_small_form(low_rank(), tmp_path)
    model = loaded(tmp_path)
    assert not model.is_quantized and not hasattr(model, "quantization_method")
    assert getattr(model, "hf_quantizer", None) is None
    for module in model.modules():
        config = getattr(module, "config", None)
        assert not hasattr(config, "_is_quantized") and not hasattr(config, "quantization_config")


def test_a_loaded_model_saves_the_small_form_of_the_ranks_that_it_has(tmp_path):
    save_small_form(low_rank(), tmp_path / "first")
    model = loaded(tmp_path / "first")
    shrink_(model, LowRankPlan({LAYER: PlannedLayer(1, (24, 16))}))
    model.save_pretrained(str(tmp_path / "second"), max_shard_size="8KB")
    found = loaded(tmp_path / "second")
    assert low_rank_layers(found)[LAYER].rank == 1
    assert_same(found, model)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_a_loaded_model_saves_itself(tmp_path, through):
    save_small_form(low_rank(), tmp_path / "first")
    copied = through(loaded(tmp_path / "first"))
    with torch.no_grad():
        copied.get_submodule(LAYER).U.zero_()
    copied.save_pretrained(str(tmp_path / "second"))
    assert_same(loaded(tmp_path / "second"), copied)


def test_a_model_made_dense_leaves_an_ordinary_checkpoint(tmp_path):
    save_small_form(low_rank("gpt2"), tmp_path)
    model = loaded(tmp_path)
    densify_(model)
    model.save_pretrained(str(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    unregister_small_form()
    found = loaded(tmp_path)
    assert not low_rank_layers(found)
    assert_same(found, model)


def test_factors_beside_an_earlier_dense_checkpoint_do_not_stay(tmp_path):
    model = low_rank()
    model.save_pretrained(str(tmp_path))
    assert is_low_rank(tmp_path)
    save_small_form(model, tmp_path)
    assert not is_low_rank(tmp_path) and not (tmp_path / "low_rank.safetensors").exists()
    assert_same(loaded(tmp_path), model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_model_and_one_with_a_head_load_each_others_layers(tmp_path, architecture):
    model = low_rank(architecture, tie_word_embeddings=True)
    save_small_form(model, tmp_path / "head")
    base = loaded(tmp_path / "head", AutoModel)
    assert_same(base, model.base_model)
    base.save_pretrained(str(tmp_path / "base"))
    assert_same(loaded(tmp_path / "base"), model)


def test_a_head_of_low_rank_is_loaded_and_left_out_of_a_base_model(tmp_path):
    model = low_rank(targets=["up_proj", "lm_head"])
    save_small_form(model, tmp_path)
    assert_same(loaded(tmp_path), model)
    base, info = AutoModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.U", "lm_head.Vh"} and not info["missing_keys"]
    assert_same(base, model.base_model)


def test_a_model_whose_initialisation_names_its_weights_is_loaded(tmp_path):
    # CLIP's draws `module.q_proj.weight` by name.
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    factorize_(model, make_plan(model, LowRankRule(ratio=0.3, multiple_of=2)))
    save_small_form(model, tmp_path)
    assert_same(loaded(tmp_path, CLIPTextModel), model)


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=6, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=1,
        learning_rate=0.01, lr_scheduler_type="constant", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("norms", [False, True])
def test_a_loaded_model_is_trained_and_resumed_to_the_bit(tmp_path, caplog, norms):
    save_small_form(low_rank(norms=norms), tmp_path / "small")
    model = loaded(tmp_path / "small")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer(model, tmp_path / "run", steps=2).train()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert_same(loaded(tmp_path / "run" / "checkpoint-2"), model)
    resumed = loaded(tmp_path / "small")
    # transformers keeps its records from the root logger.
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        checkpoint = str(tmp_path / "run" / "checkpoint-1")
        trainer(resumed, tmp_path / "again", steps=2).train(resume_from_checkpoint=checkpoint)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "unexpected keys" not in caplog.text and "missing keys" not in caplog.text
    assert_same(resumed, model)
