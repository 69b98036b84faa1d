"""What has no small form, and small forms that somebody has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.small_forms import low_rank, registered_small_form
from support.tiny_models import rewrite_tensors, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from peft_svdinit.low_rank import load_low_rank, save_small_form
from peft_svdinit.low_rank.quantizer import SmallFormConfig
from peft_svdinit.low_rank.small_form import METHOD

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with registered_small_form():
        yield


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tiny_model(), ValueError, "LlamaForCausalLM has no layer of low rank"),
        (lambda: nn.Linear(2, 2), TypeError, "must be a PreTrainedModel, got Linear"),
        (lambda: with_attribute("peft_config", {"default": 1}), ValueError, "an adapter"),
        (lambda: quantised(), TypeError, "there can be one only"),
    ],
)
def test_a_model_that_has_no_small_form_is_refused(tmp_path, make, error, words):
    with pytest.raises(error, match=words):
        save_small_form(make(), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def with_attribute(name: str, value: Any) -> nn.Module:
    model = low_rank()
    setattr(model, name, value)
    return model


def quantised() -> nn.Module:
    model = low_rank()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        save_small_form(low_rank(), tmp_path / "file")


def of_layer(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["layers"][LAYER].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (of_layer("rank", 17), f"{LAYER} .*rank must be in"),
        (of_layer("rank", 0), f"{LAYER} .*rank must be in"),
        (of_layer("rank", True), f"{LAYER} .*no integers"),
        (of_layer("rank", "4"), f"{LAYER} .*no integers"),
        (of_layer("rank", float("inf")), f"{LAYER} .*no integers"),
        (of_layer("shape", [10**12, 10**12]), f"{LAYER} has a weight of .24, 16."),
        (of_layer("shape", [16, 24]), f"{LAYER} has a weight of .24, 16."),
        (of_layer("shape", [24]), f"{LAYER} .*unpack"),
        (of_layer("shape", None), f"{LAYER} .*unpack"),
        (of_layer("norms", "no"), f"{LAYER}: norms must be true or false, got 'no'"),
        (lambda said: said["layers"].__setitem__(LAYER, [4]), f"layer {LAYER} "),
        (lambda said: said["layers"][LAYER].pop("rank"), f"{LAYER} .*rank"),
        (lambda said: said.__setitem__("layers", [LAYER]), "a list in place of names"),
        (lambda said: said.pop("layers"), "a NoneType in place of names"),
        (lambda said: said["layers"].clear(), "names no layer"),
        (lambda said: said.__setitem__("bits", 4), "bits of svdinit_low_rank are unknown"),
        (lambda said: rename(said, "model.layers.7.mlp.up_proj"), "layers.7.*which Llama"),
        (lambda said: rename(said, "__class__"), "layer model.__class__, which .* lacks"),
        (lambda said: rename(said, "model.norm"), "layer model.norm is no linear layer"),
        (lambda said: rename(said, ""), "is no linear layer"),
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused_by_the_name_of_the_layer(tmp_path, damage, words):
    save_small_form(low_rank(), tmp_path)
    edit_config(tmp_path, damage)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def rename(said: dict[str, Any], name: str) -> None:
    said["layers"][name] = said["layers"].pop(LAYER)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_plan(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_config(folder, lambda said: edit(said["layers"]))


def test_a_layer_that_is_left_out_of_the_plan_is_not_drawn_at_random(tmp_path):
    save_small_form(low_rank(), tmp_path)
    edit_plan(tmp_path, lambda layers: layers.pop(LAYER))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_tied_weight_in_the_plan_is_refused(tmp_path):
    save_small_form(low_rank(tie_word_embeddings=True), tmp_path)
    edit_plan(tmp_path, lambda each: each.update(lm_head={"rank": 4, "shape": [64, 16]}))
    with pytest.raises(ValueError, match=r"layer lm_head: its weight is tied to model\.embed"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_layer_with_a_forward_of_its_own_in_the_plan_is_refused(tmp_path):
    model = FalconForCausalLM(FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1,
    ))  # fmt: skip
    name = "transformer.h.0.mlp.dense_4h_to_h"
    layers = {name: {"rank": 4, "shape": [16, 64]}}
    model.config.quantization_config = {"quant_method": METHOD, "layers": layers}
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} cannot be of low rank: a FalconLinear"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("part", ["U", "Vh", "row_norm", "sv_norm"])
def test_a_checkpoint_that_lacks_a_factor_is_refused(tmp_path, part):
    save_small_form(low_rank(norms=True), tmp_path)
    rewrite_tensors(
        tmp_path / "model.safetensors", lambda found: found.__delitem__(f"{LAYER}.{part}")
    )
    with pytest.raises(ValueError, match=f"{LAYER}: the checkpoint lacks its {part}"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_norms_that_the_plan_does_not_name_are_not_left_out_in_silence(tmp_path):
    save_small_form(low_rank(norms=True), tmp_path, max_shard_size="8KB")
    edit_plan(tmp_path, lambda layers: layers[LAYER].pop("norms"))
    with pytest.raises(ValueError, match=f"layer {LAYER} is without norms there"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_loading_in_parts_is_refused(tmp_path):
    save_small_form(low_rank(), tmp_path)
    config = AutoConfig.from_pretrained(str(tmp_path))
    config.distributed_config = "tp"
    with pytest.raises(ValueError, match="cannot be loaded in parts"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path), config=config)


def test_a_dense_checkpoint_is_not_read_as_a_small_form(tmp_path):
    tiny_model().save_pretrained(str(tmp_path))
    plan = SmallFormConfig({LAYER: {"rank": 4, "shape": [24, 16]}})
    with pytest.raises(ValueError, match=METHOD):
        AutoModelForCausalLM.from_pretrained(str(tmp_path), quantization_config=plan)


def test_a_small_form_is_not_read_as_a_dense_checkpoint(tmp_path):
    save_small_form(low_rank(), tmp_path)
    with pytest.raises(ValueError, match=r"holds the small form; call register_small_form\(\)"):
        load_low_rank(tmp_path)
