"""Adapters become one only as layers that one model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapter_files import kohya_lora, peft_deltas
from support.tiny_models import respell, tiny_model, trained_adapter
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from peft_svdinit.adapters import merge, resize
from peft_svdinit.factors import RankRule

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llava() -> PreTrainedModel:
    """A model of text and pictures whose modules have other names since transformers 4.52."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text = LlamaConfig(**shape, vocab_size=64, num_attention_heads=2, num_key_value_heads=1)
    vision = CLIPVisionConfig(**shape, num_attention_heads=2, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()


def llava_adapter(
    folder: Path, targets: Any, *, seed: int, old: bool = False, **options: Any
) -> Any:
    """A saved LoRA of random weights; `old` spells its layers as before transformers 4.52."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    model = get_peft_model(llava(), config)
    model.save_pretrained(str(folder))
    if old:
        respell(folder / WEIGHTS, in_older_words)
    return model


def in_older_words(key: str) -> str:
    older = key.replace("model.model.language_model.", "model.language_model.model.")
    return older.replace("model.model.vision_tower.", "model.vision_tower.")


def summed(folder: Path, *models: Any) -> None:
    """Assert that stock PEFT loads from `folder` the sum of all, in all layers of any."""
    found = peft_deltas(PeftModel.from_pretrained(llava(), str(folder)))
    terms = [peft_deltas(model) for model in models]
    assert found.keys() == {name for term in terms for name in term}
    for name, delta in found.items():
        expected = sum(term.get(name, torch.zeros(())) for term in terms)
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5)


OLD_FIRST, NEW_FIRST = (True, False), (False, True)


@pytest.mark.parametrize("old", [OLD_FIRST, NEW_FIRST])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "fc1"]])
def test_old_and_new_names_of_one_model_are_added_up(tmp_path, old, targets):
    one = llava_adapter(tmp_path / "a", ["q_proj", "v_proj"], seed=1, old=old[0])
    two = llava_adapter(tmp_path / "b", targets, seed=2, old=old[1])
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    summed(tmp_path / "m", one, two)
    path = str(tmp_path / ("a" if old[0] else "b"))
    own, given = "language_model.model.layers.0", "model.language_model.layers.0"
    said = f"{path} spells the model's layers in an older way, {own}.self_attn.q_proj for {given}"
    assert said in merged.summary()
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report["respelled"] == {
        path: {"own": f"{own}.self_attn.q_proj", "given": f"{given}.self_attn.q_proj"}
    }
    resize([tmp_path / "a", tmp_path / "b"], tmp_path / "r", RankRule(rank=16))
    summed(tmp_path / "r", one, two)


def test_what_lies_beside_the_factors_is_respelled_with_them(tmp_path):
    for name, old in (("a", True), ("b", False)):
        model = llava_adapter(tmp_path / name, ["q_proj"], seed=1, old=old, lora_bias=True)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("lora_B.default.bias")}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    loaded = PeftModel.from_pretrained(llava(), str(tmp_path / "m"))
    found = dict(loaded.named_parameters())
    scaling = 8 / 2
    for name, bias in biases.items():
        assert bias.any()
        torch.testing.assert_close(found[name], 2 * scaling * bias, check_stride=False)


def test_one_spelling_is_nothing_to_speak_of(tmp_path):
    for index, name in enumerate("ab"):
        llava_adapter(tmp_path / name, ["q_proj"], seed=index)
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert merged.respelled == {} and "spells" not in merged.summary()


def test_a_spelling_that_cannot_be_told_is_refused_and_the_remedy_helps(tmp_path):
    one = llava_adapter(tmp_path / "a", r".*language_model.*q_proj", seed=1)
    two = llava_adapter(tmp_path / "b", ["q_proj"], seed=2, old=True)
    message = r"b spells .* name of vision_tower\..* cannot be told from theirs; load both into"
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    for name in "ab":
        again = PeftModel.from_pretrained(llava(), str(tmp_path / name))
        again.save_pretrained(str(tmp_path / f"{name}2"))
    merge([tmp_path / "a2", tmp_path / "b2"], tmp_path / "m")
    summed(tmp_path / "m", one, two)


def test_an_adapter_of_two_spellings_is_refused(tmp_path):
    llava_adapter(tmp_path / "a", ["q_proj"], seed=1)
    llava_adapter(tmp_path / "b", r".*language_model.*q_proj", seed=2, old=True)
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    both = {key.replace("language_model.model", "model"): v.clone() for key, v in tensors.items()}
    save_file(tensors | both, tmp_path / "b" / WEIGHTS)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    (tmp_path / "b" / CONFIG).write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    message = r"b has language_model\.model\.layers and .*a has model\.language_model\.layers"
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_spellings_of_which_none_is_the_newer_one_are_refused(tmp_path):
    llava_adapter(tmp_path / "a", r".*language_model.*q_proj", seed=1, old=True)
    trained_adapter(tmp_path / "b", target_modules=["q_proj"])
    message = r"a has language_model\.model\.layers and .*b has model\.layers: are they for the"
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_adapters_of_other_models_are_refused_and_the_remedy_helps(tmp_path):
    trained_adapter(tmp_path / "a", target_modules=["q_proj"])
    trained_adapter(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"])
    message = (
        r"a and .*gpt2 share no layer, nor any part of a model \(model\.layers\.0\.self_attn\."
        r"q_proj; transformer\.h\.0\.attn\.c_attn\): are they for the same model\?"
    )
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "gpt2"], tmp_path / "m")
    with pytest.raises(ValueError, match="share no layer"):
        resize(
            [tmp_path / "a", tmp_path / "a", tmp_path / "gpt2"], tmp_path / "m", RankRule(rank=2)
        )
    # Text and pictures of one model share no more by their names; the base knows.
    one = llava_adapter(tmp_path / "text", r".*language_model.*q_proj", seed=1)
    two = llava_adapter(tmp_path / "pictures", r".*vision_tower.*q_proj", seed=2)
    with pytest.raises(ValueError, match=r"share no layer, .* by PEFT's add_weighted_adapter"):
        merge([tmp_path / "text", tmp_path / "pictures"], tmp_path / "m")
    model: Any = PeftModel.from_pretrained(llava(), str(tmp_path / "text"), adapter_name="text")
    model.load_adapter(str(tmp_path / "pictures"), "pictures")
    model.add_weighted_adapter(["text", "pictures"], [1.0, 1.0], "m", combination_type="cat")
    model.set_adapter("m")
    model.save_pretrained(str(tmp_path), selected_adapters=["m"])
    summed(tmp_path / "m", one, two)


@pytest.mark.parametrize("targets", [["v_proj"], ["down_proj"], ".*layers.1.*q_proj"])
def test_layers_of_one_model_that_no_two_adapters_share_are_added_up(tmp_path, targets):
    one = trained_adapter(tmp_path / "a", target_modules=r".*layers.0.*q_proj")
    two = trained_adapter(tmp_path / "b", target_modules=targets, seed=2)
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert merged.relative_error < 1e-6
    assert "No layer is in two of the adapters: are they for the same model?" in merged.summary()
    expected = peft_deltas(one) | peft_deltas(two)
    found = peft_deltas(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "m")))
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=1e-6)


def test_a_chain_of_adapters_is_of_one_model_in_any_order(tmp_path):
    for name, targets in zip("abc", (["q_proj"], ["c_attn"], ["q_proj"]), strict=True):
        trained_adapter(tmp_path / name, "gpt2" if name == "b" else "llama", target_modules=targets)
    # Of both parts: it makes the others meet.
    tensors = load_file(tmp_path / "c" / WEIGHTS) | load_file(tmp_path / "b" / WEIGHTS)
    save_file(tensors, tmp_path / "c" / WEIGHTS)
    config = json.loads((tmp_path / "c" / CONFIG).read_text())
    config["target_modules"] = ["q_proj", "c_attn"]
    (tmp_path / "c" / CONFIG).write_text(json.dumps(config))
    merged = merge([tmp_path / name for name in "abc"], tmp_path / "m")
    assert len(merged.layers) == len(tensors) / 2 and merged.relative_error < 1e-6


def test_files_for_other_models_of_a_pipeline_are_added_up_and_other_spellings_refused(tmp_path):
    unet, text, other = (tmp_path / f"{name}.safetensors" for name in ("unet", "text", "other"))
    for path, part in ((unet, "lora_unet_"), (text, "lora_te_"), (other, "lora_unet_")):
        kohya_lora(path)
        respell(path, lambda key, part=part: key if key.startswith(part) else None)
    output = tmp_path / "m.safetensors"
    assert len(resize([unet, text], output, RankRule(rank=4)).layers) == 5
    respell(other, lambda key: key.replace("lora_unet_", "lora_unet_input_"))
    with pytest.raises(ValueError, match=r"share no layer, .* resize each alone"):
        resize([unet, other], output, RankRule(rank=4))


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["v_proj", "down_proj"]},
        {"target_modules": ".*v_proj|.*down_proj"},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [1]},
    ],
)
def test_layers_that_peft_would_pass_over_are_refused(tmp_path, selection):
    trained_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | selection))
    message = r"stores layer model\.layers\.0\..*, which adapter_config.json does not select"
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "m")
