"""Fine-tunes whose head is a task's own: the adapter has the head whole, and the task type."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.small_configs import small_config

from peft_svdinit.cli import main
from peft_svdinit.factors import FactorsFile
from peft_svdinit.files import read_json
from peft_svdinit.models import linear_modules

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The class of a fine-tune, that of the model it was trained from, and the modules stored whole.
CASES = [
    ("LlamaForSequenceClassification", "LlamaForSequenceClassification", ["score"]),
    ("LlamaForSequenceClassification", "LlamaForCausalLM", ["score"]),
    ("LlamaForSequenceClassification", "LlamaModel", ["score"]),
    ("LlamaForTokenClassification", "LlamaForCausalLM", ["score"]),
    ("Qwen2ForSequenceClassification", "Qwen2ForCausalLM", ["score"]),
    ("GPT2ForSequenceClassification", "GPT2LMHeadModel", ["score"]),
    ("BertForSequenceClassification", "BertForSequenceClassification", ["classifier"]),
    ("BertForSequenceClassification", "BertModel", ["classifier"]),
    ("BertForSequenceClassification", "BertForMaskedLM", ["bert.pooler.dense", "classifier"]),
    ("BertForTokenClassification", "BertForMaskedLM", ["classifier"]),
    ("BertForQuestionAnswering", "BertModel", ["qa_outputs"]),
    ("RobertaForSequenceClassification", "RobertaForMaskedLM", ["classifier"]),
    (
        "DistilBertForSequenceClassification",
        "DistilBertForMaskedLM",
        ["classifier", "pre_classifier"],
    ),
    ("DebertaV2ForSequenceClassification", "DebertaV2ForMaskedLM", ["classifier", "pooler.dense"]),
]


def tuned_pair(folder: Path, tuned: str, base: str, labels: int) -> Any:
    """Save a base and a fine-tune of another head, and give the fine-tune."""
    architecture: Any = getattr(transformers, base)
    torch.manual_seed(0)
    config = small_config(architecture)
    config.pad_token_id = config.pad_token_id or 0
    architecture(config).save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = getattr(transformers, tuned).from_pretrained(
        folder / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (model.get_parameter(f"{name}.weight") for name in linear_modules(model)):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "tuned")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        found = model.eval()(input_ids=tokens)
    return found.start_logits if "start_logits" in found else found.logits


def extracted(folder: Path, *options: str) -> dict[str, Any]:
    given = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--rank", "64"]
    main(["extract", *given, "--output_dir", str(folder / "adapter"), *options])
    return read_json(folder / "adapter" / "adapter_config.json", "adapter")


def adapted(folder: Path, architecture: str, labels: int) -> Any:
    """The base with the adapter around it, as a user loads the two."""
    torch.manual_seed(9)  # A head that the base lacks is drawn at random, and replaced.
    loaded = getattr(transformers, architecture).from_pretrained(
        folder / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    return PeftModel.from_pretrained(loaded, str(folder / "adapter"))


@pytest.mark.parametrize(("tuned", "base", "whole"), CASES)
def test_the_adapter_is_the_classifier(tuned, base, whole, tmp_path):
    labels = 2 if tuned.endswith("QuestionAnswering") else 3
    model = tuned_pair(tmp_path, tuned, base, labels)
    config = extracted(tmp_path)
    assert config["task_type"] == next(t for end, t in TASKS.items() if tuned.endswith(end))
    assert sorted(config["modules_to_save"]) == whole
    found = logits(adapted(tmp_path, tuned, labels))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)


def test_a_head_of_other_labels_than_the_base_has_is_stored_whole(tmp_path):
    tuned_pair(tmp_path, "BertForSequenceClassification", "BertForMaskedLM", 2)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "tuned").rename(tmp_path / "base")
    model: Any = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    ).eval()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    assert extracted(tmp_path)["modules_to_save"] == ["classifier"]
    found = logits(adapted(tmp_path, "BertForSequenceClassification", 5))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "task_type", "whole"),
    [
        (["--exclude_modules", "score", "--modules_to_save", "score"], "SEQ_CLS", ["score"]),
        (["--exclude_modules", "score"], None, None),
        (["--target_modules", "q_proj", "v_proj", "score"], None, None),
        (["--target_modules", "q_proj", "v_proj"], "SEQ_CLS", ["score"]),
        (["--modules_to_save", "norm"], "SEQ_CLS", ["model.norm", "score"]),
    ],
)
def test_a_head_that_is_named_is_treated_as_said(options, task_type, whole, tmp_path):
    tuned_pair(tmp_path, "LlamaForSequenceClassification", "LlamaForSequenceClassification", 2)
    config = extracted(tmp_path, *options)
    assert (config["task_type"], config["modules_to_save"]) == (task_type, whole)


def test_a_body_that_the_base_lacks_is_no_head(tmp_path, capsys):
    tuned_pair(tmp_path, "LlamaForSequenceClassification", "LlamaForCausalLM", 3)
    weights = load_file(tmp_path / "base/model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if "layers.1.mlp" not in key}
    save_file(kept, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        extracted(tmp_path)
    assert "has no weight for layer model.layers.1.mlp" in capsys.readouterr().err


def test_factors_of_a_classifier_have_no_head_and_say_so(tmp_path, capsys):
    tuned_pair(tmp_path, "LlamaForSequenceClassification", "LlamaForCausalLM", 3)
    given = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned")]
    given += ["--save_as", "factors", "--rank", "8", "--lora_r", "4", "--plots", "false"]
    main(["extract", *given, "--output_dir", str(tmp_path / "factors")])
    assert "Not covered: 1 changed tensors" in capsys.readouterr().out
    assert "score" not in FactorsFile(tmp_path / "factors").names
