"""Which layers may be switched: not heads, embeddings, tied, routing nor quantised ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.low_rank_cases import switch
from support.small_configs import class_of_family, small_config
from support.tiny_models import tiny_model
from torch import nn
from torch.testing import assert_close

from peft_svdinit.low_rank import (
    LowRankLinear,
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    factorize_,
    low_rank_layers,
    make_plan,
)
from peft_svdinit.low_rank.candidates import candidates


def skeleton(name: str, **options: Any) -> Any:
    architecture: Any = class_of_family(name)
    config = small_config(architecture)
    for option, value in options.items():
        setattr(config, option, value)
    with torch.device("meta"):
        return architecture(config)


HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "RobertaForSequenceClassification": ["classifier.dense", "classifier.out_proj"],
    "BertForMaskedLM": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
    "T5ForConditionalGeneration": ["lm_head"],
    "T5ForSequenceClassification": ["classification_head.dense", "classification_head.out_proj"],
    "GPT2LMHeadModel": ["lm_head"],
    "GPT2ForSequenceClassification": ["score"],
    "LlamaForCausalLM": ["lm_head"],
    "ViTForImageClassification": ["classifier"],
    "llava": ["lm_head"],
    "qwen2_vl": ["lm_head"],
    "bark": ["semantic.lm_head", "coarse_acoustics.lm_head", "fine_acoustics.lm_heads.0"],
    "encoder-decoder": ["decoder.cls.predictions.decoder"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_embeddings_stay_and_the_body_is_taken(name):
    model = skeleton(name)
    chosen, reasons = candidates(model)
    modules = dict(model.named_modules())
    for head in HEADS[name]:
        assert isinstance(modules[head], nn.Linear) and head not in chosen
    linear = {n for n, m in modules.items() if isinstance(m, (nn.Linear, transformers.Conv1D))}
    embedded = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    assert chosen.keys() <= linear and not chosen.keys() & reasons.keys()
    assert not embedded & {id(modules[layer].weight) for layer in chosen}
    for layer in linear - chosen.keys():
        assert any(layer == head or head.startswith(layer) for head in HEADS[name]) or (
            layer.split(".")[-1].startswith("lm_head") or layer in reasons
        )
    for layer, candidate in chosen.items():
        out, inner = candidate.shape
        weight = modules[layer].weight
        oriented = weight.shape[::-1] if isinstance(modules[layer], transformers.Conv1D) else None
        assert (out, inner) == (oriented or weight.shape)


def test_a_vision_language_model_is_switched_in_both_parts():
    for name, parts in (
        ("llava", ("model.vision_tower", "model.language_model", "model.multi_modal_projector")),
        ("qwen2_vl", ("model.visual", "model.language_model")),
    ):
        chosen, _ = candidates(skeleton(name))
        for part in parts:
            assert any(layer.startswith(part) for layer in chosen), part


def test_an_untied_head_is_no_candidate_unless_it_is_named():
    model = skeleton("T5ForConditionalGeneration", tie_word_embeddings=False)
    assert "lm_head" not in candidates(model)[0]
    assert set(candidates(model, ["lm_head"])[0]) == {"lm_head"}
    classifier = skeleton("BertForSequenceClassification")
    assert set(candidates(classifier, ["classifier"])[0]) == {"classifier"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_tied_layer_is_refused_where_it_is_named(architecture):
    model = tiny_model(architecture, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head cannot be of low rank: its weight is tied to"):
        candidates(model, ["lm_head"])
    plan = LowRankPlan({"lm_head": PlannedLayer(2, (64, 16))})
    with pytest.raises(ValueError, match="tied to"):
        factorize_(model, plan)


ROUTERS = {
    "afmoe": ["model.layers.1.mlp.router.gate"],
    "switch_transformers": ["encoder.block.1.layer.1.mlp.router.classifier"],
    "jetmoe": ["model.layers.0.mlp.router.layer"],
    "qwen2_moe": ["model.layers.0.mlp.shared_expert_gate"],
    "phimoe": ["model.layers.0.mlp.router"],
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_of_experts_stay(family):
    model = skeleton(family)
    chosen, reasons = candidates(model)
    assert chosen and not any("router" in name for name in chosen)
    for router in ROUTERS[family]:
        assert isinstance(model.get_submodule(router), nn.Linear) and router not in chosen
        assert reasons.get(router, "it chooses between experts") == "it chooses between experts"
    # Gates of a feed-forward network are none.
    gates = [n for n in dict(model.named_modules()) if n.endswith(("gate_proj", ".wi_0"))]
    assert all(name in chosen for name in gates)


class Shared(nn.Module):
    """One layer at three places, two of them in one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.inner = nn.Sequential(nn.Tanh(), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.again(torch.tanh(self.first(x))))


def test_a_shared_layer_is_switched_once_and_everywhere():
    model = Shared().double()
    before = copy.deepcopy(model)
    (switched,) = switch(model)
    assert model.first is model.again is model.inner[1] is switched.layer
    with torch.no_grad():
        before.first.weight.copy_(switched.layer.weight)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert_close(model(x), before(x))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_layers_are_left_or_refused_with_the_reason(kind):
    support = pytest.importorskip("support.quantised")
    model = tiny_model()
    quantised = support.quantised(model, kind)
    with pytest.raises(ValueError, match=r"no layer .* is left .*: a Linear(4bit|8bitLt) of"):
        candidates(quantised)
    name = "model.layers.0.self_attn.q_proj"
    model.set_submodule(name, quantised.get_submodule(name))
    plan = make_plan(model, LowRankRule(ratio=0.25, multiple_of=2))
    assert name not in plan.layers and "is no dense layer's" in plan.dense[name]
    with pytest.raises(ValueError, match="q_proj cannot be of low rank: a Linear"):
        factorize_(model, LowRankPlan({name: PlannedLayer(2, (16, 16))}))
    assert not low_rank_layers(model)


def test_a_layer_whose_forward_is_another_is_left():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(16, 16), nn.Linear(16, 16))
    chosen, reasons = candidates(model)
    assert set(chosen) == {"1"} and "Scaled" in reasons["0"]


def test_a_model_of_low_rank_or_with_an_adapter_is_refused():
    model = tiny_model()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"carries an adapter; merge it"):
        make_plan(adapted, LowRankRule(ratio=0.25))
    switched = switch(model)
    for plan in (LowRankPlan.of(model), None):
        with pytest.raises(ValueError, match=r"of low rank already: .* shrink_ lowers"):
            if plan is None:
                make_plan(model, LowRankRule(ratio=0.25))
            else:
                factorize_(model, plan)
    assert all(isinstance(model.get_submodule(each.name), LowRankLinear) for each in switched)


def test_names_and_expressions_choose_and_exclude():
    model = tiny_model()
    assert set(candidates(model, r".*\.0\..*up_proj")[0]) == {"model.layers.0.mlp.up_proj"}
    chosen, reasons = candidates(model, ["q_proj", "k_proj"], ["1.self_attn.k_proj"])
    assert len(chosen) == 3 and reasons == {"model.layers.1.self_attn.k_proj": "excluded"}
    with pytest.raises(ValueError, match="matches no linear layer"):
        candidates(model, ["query"])
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM is left .*: excluded"):
        candidates(model, ["q_proj"], ["q_proj"])
