"""Fine-tunes that are another model than their base in more than a classifier's head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.small_configs import small_config

from peft_svdinit.cli import main
from peft_svdinit.models import linear_modules

WEIGHTS = "model.safetensors"


def tuned_pair(folder: Path, tuned: str, base: str, **options: Any) -> Any:
    """A base and a fine-tune of all its linear layers, saved; the class of the fine-tune."""
    architecture: Any = getattr(transformers, base)
    torch.manual_seed(0)
    architecture(small_config(architecture)).save_pretrained(folder / "base")
    model = getattr(transformers, tuned).from_pretrained(
        folder / "base", ignore_mismatched_sizes=True, **options
    )
    with torch.no_grad():
        for name in linear_modules(model):
            weight = model.get_parameter(f"{name}.weight")
            weight += 0.05 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    model.save_pretrained(folder / "tuned")
    return type(model)


def extract(folder: Path, *options: str) -> dict[str, Any]:
    given = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--rank", "2"]
    main(["extract", *given, "--output_dir", str(folder / "adapter"), *options])
    return json.loads((folder / "adapter/extraction.json").read_text())


def merged(folder: Path, architecture: Any, **options: Any) -> dict[str, torch.Tensor]:
    base = architecture.from_pretrained(folder / "base", ignore_mismatched_sizes=True, **options)
    adapted: Any = PeftModel.from_pretrained(base, str(folder / "adapter"))
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("tuned", "base", "labels", "choice"),
    [
        ("ViTForImageClassification", "ViTForImageClassification", 5, []),
        ("BartForSequenceClassification", "BartForSequenceClassification", 5, []),
        ("T5ForSequenceClassification", "T5ForConditionalGeneration", 3, []),
        ("LlamaModel", "LlamaForCausalLM", None, []),
        ("WhisperForConditionalGeneration", "WhisperForConditionalGeneration", None, []),
        ("CLIPModel", "CLIPModel", None, ["--modules_to_save", "changed"]),
        ("ConvNextModel", "ConvNextModel", None, ["--modules_to_save", "changed"]),
    ],
)
def test_base_and_adapter_are_the_tuned_model(tuned, base, labels, choice, tmp_path):
    options = {} if labels is None else {"num_labels": labels}
    architecture = tuned_pair(tmp_path, tuned, base, **options)
    extract(tmp_path, *choice)
    found = merged(tmp_path, architecture, **options)
    expected = architecture.from_pretrained(tmp_path / "tuned").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("tuned", "base", "module"),
    [
        ("BertForMaskedLM", "BertModel", "cls.predictions"),
        ("RobertaForMaskedLM", "RobertaModel", "lm_head"),
        ("ViTForMaskedImageModeling", "ViTModel", "vit.embeddings"),
        ("SegformerForSemanticSegmentation", "SegformerForImageClassification", "batch_norm"),
    ],
)
def test_what_cannot_be_stored_is_left_out_as_the_message_says(
    tuned, base, module, tmp_path, capsys
):
    architecture = tuned_pair(tmp_path, tuned, base)
    with pytest.raises(SystemExit):
        extract(tmp_path)
    error = capsys.readouterr().err
    assert f"can leave {module} out" in error or f"{module} as a whole" in error
    extract(tmp_path, "--exclude_modules", module)
    found = merged(tmp_path, architecture)
    for name, tensor in architecture.from_pretrained(tmp_path / "tuned").state_dict().items():
        if module not in name and "mask_token" not in name:
            torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-4, rtol=0)


def test_a_model_of_sound_gets_no_task_type_that_passes_on_tokens_alone(tmp_path):
    architecture = tuned_pair(tmp_path, *["WhisperForConditionalGeneration"] * 2)
    extract(tmp_path)
    base = architecture.from_pretrained(tmp_path / "base")
    adapted: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    sound = torch.randn(1, base.config.num_mel_bins, 2 * base.config.max_source_positions)
    assert (
        adapted(input_features=sound, decoder_input_ids=torch.tensor([[1, 2]])).logits.shape[1] == 2
    )


def test_a_head_of_another_shape_than_the_configuration_says_is_refused(tmp_path, capsys):
    tuned_pair(tmp_path, *["LlamaForSequenceClassification"] * 2)
    tensors = load_file(tmp_path / "tuned" / WEIGHTS)
    save_file({**tensors, "score.weight": torch.randn(5, 32)}, tmp_path / "tuned" / WEIGHTS)
    for verify in ("none", "full"):
        with pytest.raises(SystemExit):
            extract(tmp_path, "--verify", verify)
        assert "score.weight has shape (5, 32), but the model" in capsys.readouterr().err
        assert not (tmp_path / "adapter").exists()


def test_an_output_head_of_a_grown_vocabulary_is_not_cut_unasked(tmp_path, capsys):
    tuned_pair(tmp_path, "LlamaForCausalLM", "LlamaModel")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(SystemExit):
        extract(tmp_path, "--exclude_modules", "embed_tokens")
    assert "lm_head.weight has shape (100, 32), but the model" in capsys.readouterr().err


def test_a_pooler_that_neither_stores_is_left_out_and_said(tmp_path, caplog):
    tuned_pair(tmp_path, "BertModel", "BertForMaskedLM")
    tensors = load_file(tmp_path / "tuned" / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "tuned" / WEIGHTS, {"format": "pt"})
    extract(tmp_path)
    assert "pooler.dense of BertModel: in neither checkpoint, and left out" in caplog.text


def test_changed_modules_that_peft_cannot_store_stay_uncovered(tmp_path):
    model: Any = transformers.CLIPModel(small_config(transformers.CLIPModel))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.logit_scale += 1
        model.text_model.final_layer_norm.weight += 1
        model.text_projection.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, "--modules_to_save", "changed")
    assert report["stored_whole"] == ["text_model.final_layer_norm"]
    assert list(report["uncovered"]) == ["logit_scale"]


def test_a_fine_tune_saved_with_the_names_of_a_compiled_model_is_read(tmp_path):
    architecture = tuned_pair(tmp_path, *["LlamaForCausalLM"] * 2)
    tensors = load_file(tmp_path / "tuned" / WEIGHTS)
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "tuned" / WEIGHTS, {"format": "pt"})
    extract(tmp_path)
    found = merged(tmp_path, architecture)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


def test_factors_are_exported_for_the_class_that_they_are_of(tmp_path):
    tuned_pair(tmp_path, "LlamaForSequenceClassification", "LlamaForCausalLM")
    pair = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned")]
    made = ["--save_as", "factors", "--rank", "4", "--lora_r", "2", "--plots", "false"]
    main(["extract", *pair, *made, "--output_dir", str(tmp_path / "factors")])
    for base in ([], ["--base", str(tmp_path / "base")]):
        given = ["--factors", str(tmp_path / "factors"), "--lora_r", "2", *base]
        main(["export", *given, "--output_dir", str(tmp_path / "adapter")])
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert config["task_type"] is None
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=2
        )
        assert PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
