"""PEFT folders with more than pairs of factors: what stock PEFT makes of the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svdinit.adapters import MergeMethod, merge, resize
from peft_svdinit.factors import RankRule
from peft_svdinit.masks import scores_of_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.arange(3, 14)[None]
ALL = RankRule(rank=16)


def base(vocabulary: int = 64) -> Any:
    """A Llama whose attention has biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    if vocabulary != 64:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def trained(folder: Path, *, seed: int = 1, config: Any = LoraConfig, **options: Any) -> Tensor:
    """Save an adapter all of whose parameters moved; the logits that it gives."""
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    save: dict[str, Any] = {}
    if vocabulary := options.pop("vocabulary", None):
        save = {"save_embedding_layers": True}
    model: Any = get_peft_model(base(vocabulary or 64), config(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), **save)
    with torch.no_grad():
        return model(TOKENS).logits


def logits(folder: Path, vocabulary: int = 64) -> Tensor:
    """Of stock PEFT, which finds all that it looks for."""
    model = PeftModel.from_pretrained(base(vocabulary), str(folder)).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


KINDS: dict[str, dict[str, Any]] = {
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a grown vocabulary": {"vocabulary": 68},
    "a targeted head": {"target_modules": ["q_proj", "lm_head"]},
    "all biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only"},
    "biases of lora_B": {"lora_bias": True, "lora_alpha": 3},
    "biases of lora_B by rslora": {"lora_bias": True, "lora_alpha": 3, "use_rslora": True},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "DoRA": {"use_dora": True},
    "LoHa": {"config": LoHaConfig, "modules_to_save": ["lm_head"]},
    "LoKr": {"config": LoKrConfig, "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
def test_stock_peft_makes_the_same_of_a_resized_adapter(tmp_path, options):
    expected = trained(tmp_path / "a", **options)
    vocabulary = options.get("vocabulary", 64)
    assert not torch.allclose(base(vocabulary)(TOKENS).logits, expected, atol=0.1)
    report = resize([tmp_path / "a"], tmp_path / "r", ALL)
    assert_same(logits(tmp_path / "r", vocabulary), expected)
    beside = {k: t for k, t in load_file(tmp_path / "a" / WEIGHTS).items() if "lora_" not in k}
    found = load_file(tmp_path / "r" / WEIGHTS)
    for key, tensor in beside.items():
        if "hada_" not in key and "lokr_" not in key:
            assert torch.equal(found[key], tensor)
    config = json.loads((tmp_path / "r" / CONFIG).read_text())
    for option in ("bias", "lora_bias", "use_dora", "modules_to_save", "trainable_token_indices"):
        assert (config[option] or "none") == (options.get(option) or "none")
    names = [name for names in report.as_dict()["carried"].values() for name in names]
    assert {f"base_model.model.{name}" for name in names} <= set(found) and names


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("DoRA", "LoHa", "LoKr")])
def test_halves_of_an_adapter_merge_into_it(tmp_path, kind):
    options = KINDS[kind]
    expected = trained(tmp_path / "a", **options)
    merged = merge([tmp_path / "a"] * 2, tmp_path / "m", weights=[0.25, 0.75])
    assert_same(logits(tmp_path / "m", options.get("vocabulary", 64)), expected)
    assert "carried over beside the factors" in merged.summary()


def test_biases_of_lora_B_are_summed_by_every_method_and_also_where_one_has_none(tmp_path):
    trained(tmp_path / "a", lora_bias=True, lora_alpha=2, target_modules=["q_proj", "v_proj"])
    trained(tmp_path / "b", lora_bias=True, seed=2)
    trained(tmp_path / "c", target_modules=["o_proj"], seed=3)
    key = "base_model.model.model.layers.0.self_attn.{}.lora_B.bias"
    expected = {
        "q_proj": 2 * 0.5 * load_file(tmp_path / "a" / WEIGHTS)[key.format("q_proj")]
        - 2 * load_file(tmp_path / "b" / WEIGHTS)[key.format("q_proj")],
        "v_proj": 2 * 0.5 * load_file(tmp_path / "a" / WEIGHTS)[key.format("v_proj")],
        "o_proj": torch.zeros(16),
    }
    for name, method in (("cat", None), ("linear", MergeMethod("linear"))):
        merge(
            [tmp_path / path for path in "abc"],
            tmp_path / name,
            method,
            weights=[2.0, -1.0, 1.0],
        )
        found = load_file(tmp_path / name / WEIGHTS)
        for layer, bias in expected.items():
            torch.testing.assert_close(found[key.format(layer)], bias)
        logits(tmp_path / name)


def test_modules_that_differ_are_refused_and_the_remedy_helps(tmp_path):
    expected = trained(tmp_path / "a", modules_to_save=["lm_head"])
    trained(tmp_path / "b", seed=2, modules_to_save=["lm_head"])
    trained(tmp_path / "c", seed=2)
    for other, where in (("b", "another one in each of"), ("c", "in .*a only")):
        message = rf"lm_head\.weight is {where}.*put the one .* into every adapter, or delete"
        with pytest.raises(ValueError, match=message):
            merge([tmp_path / "a", tmp_path / other], tmp_path / "m")
        assert not (tmp_path / "m").exists()
    key = "base_model.model.lm_head.weight"
    head = load_file(tmp_path / "a" / WEIGHTS)[key]
    for other in "bc":
        tensors = load_file(tmp_path / other / WEIGHTS) | {key: head.clone()}
        save_file(tensors, tmp_path / other / WEIGHTS)
    merge([tmp_path / name for name in "abc"], tmp_path / "m", weights=[1.0, 0.5, -0.5])
    assert_same(logits(tmp_path / "m"), expected)
    # An adapter of weight 0 has no say.
    trained(tmp_path / "d", seed=3)
    merge([tmp_path / name for name in "ad"], tmp_path / "n", weights=[1.0, 0.0])
    assert_same(logits(tmp_path / "n"), expected)
    with pytest.raises(ValueError, match=r"has weight 2, but lm_head.* use weight 1"):
        merge([tmp_path / name for name in "ad"], tmp_path / "o", weights=[2.0, 0.0])


def test_adapters_that_train_other_tokens_are_refused(tmp_path):
    trained(tmp_path / "a", trainable_token_indices=[3, 5])
    trained(tmp_path / "b", trainable_token_indices=[3, 5])
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    config["trainable_token_indices"] = [3, 6]
    (tmp_path / "b" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trainable_token_indices differ"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    (tmp_path / "b" / CONFIG).write_text(json.dumps(config | {"bias": "some"}))
    with pytest.raises(ValueError, match=r"bias must be one of none, lora_only, all, got 'some'"):
        resize([tmp_path / "b"], tmp_path / "r", ALL)


def test_a_mask_is_of_the_factors_alone(tmp_path, caplog):
    trained(tmp_path / "a", modules_to_save=["lm_head"])
    scores = scores_of_adapter(tmp_path / "a", seed=1)
    assert list(scores.scores) == ["model.layers.0.self_attn.q_proj"]
    assert "left out: lm_head.weight" in caplog.text
