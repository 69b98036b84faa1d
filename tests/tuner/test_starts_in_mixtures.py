"""Starts in mixtures of experts, some of whose names PEFT takes for the fused experts."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.mixture_of_experts import FAMILIES
from support.peft_fixtures import adapted_layers, has_lora_layers, logits, train

from peft_svdinit import LoriConfig, SvdLoraConfig
from peft_svdinit.models import linear_modules

ONE_LAYER = "model.layers.0.self_attn.q_proj"


def config_of(kind: str, **options: Any) -> LoraConfig:
    if kind == "lori":
        return LoriConfig(r=2, lori_density=0.5, **options)
    # Gates of shared experts have one output, and so one triplet.
    return SvdLoraConfig(r=1, svd_source="weight", svd_start="reference", **options)


@pytest.mark.parametrize("kind", ["svd", "lori"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_all_linear_works_or_is_refused_with_a_choice_that_works(family, kind, tmp_path):
    model = family.model()
    base, targets = copy.deepcopy(model), "all-linear"
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    if not family.linear_target:
        remedy = re.escape(f"set target_modules={family.readable}")
        with pytest.raises(ValueError, match=remedy + "$"):
            get_peft_model(model, config_of(kind, target_modules=targets))
        assert not has_lora_layers(model)
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        targets = family.readable
    started: Any = get_peft_model(model, config_of(kind, target_modules=targets))
    assert set(adapted_layers(started)) == set(linear_modules(base, family.readable))
    before = logits(base)
    train(started, steps=1)
    expected = logits(started)
    assert not torch.equal(expected, before)
    started.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert (logits(loaded) - expected).abs().max() < 1e-4


def test_exclude_modules_are_kept_out_of_the_choice_that_works():
    options = {"exclude_modules": ["o_proj"]}
    with pytest.raises(ValueError, match=re.escape("['k_proj', 'q_proj', 'v_proj']")):
        get_peft_model(
            FAMILIES["Mixtral"].model(), config_of("lori", target_modules="all-linear", **options)
        )


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj"], ["up_proj"]])
def test_experts_alone_are_told_to_be_another_choice(targets):
    with pytest.raises(ValueError, match="choose other layers"):
        get_peft_model(FAMILIES["Qwen3Moe"].model(), config_of("svd", target_modules=targets))


def test_a_regex_for_one_layer_is_not_read_as_one_for_all():
    regex = re.escape(ONE_LAYER)
    stock: Any = get_peft_model(FAMILIES["Qwen3Moe"].model(), LoraConfig(target_modules=regex))
    assert len(adapted_layers(stock)) == 2
    with pytest.raises(ValueError, match=re.escape(f"set target_modules={[ONE_LAYER]}")):
        get_peft_model(FAMILIES["Qwen3Moe"].model(), config_of("lori", target_modules=regex))
    config = config_of("lori", target_modules=[ONE_LAYER])
    assert set(adapted_layers(get_peft_model(FAMILIES["Qwen3Moe"].model(), config))) == {ONE_LAYER}


def test_a_second_adapter_is_refused_likewise_and_leaves_the_first():
    first = config_of("svd", target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(FAMILIES["Olmoe"].model(), first)
    expected = logits(model)
    remedy = re.escape("set target_modules=['k_proj', 'o_proj', 'q_proj', 'v_proj']")
    with pytest.raises(ValueError, match=remedy):
        model.add_adapter("second", config_of("lori", target_modules="all-linear"))
    assert list(model.base_model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
