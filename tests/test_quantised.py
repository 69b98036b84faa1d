"""Starts over bitsandbytes' quantised bases, on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft_fixtures import Scene, adapter_weights, equal_bits, logits, make_scene, train
from torch import nn
from transformers import PreTrainedModel

from peft_svdinit import initialize_lora_from_factors
from peft_svdinit.tuner import lora_layers

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = ("4bit", "8bit")


def quantised(base: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy of `base` whose linear layers are quantised, as from_pretrained leaves it."""
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        options = {"bias": module.bias is not None}
        if kind == "4bit":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
                **options,
            )
        else:
            layer = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, has_fp16_weights=False, **options
            )
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer.to("cpu").requires_grad_(False))
    setattr(model, f"is_loaded_in_{kind}", True)
    return model.eval()


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module", params=KINDS)
def base(request, scene) -> PreTrainedModel:
    try:
        model = quantised(scene.base, request.param)
        logits(model)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no {request.param} on this CPU: {error}")
    return model


def started(base: PreTrainedModel, scene: Scene, **options):
    return get_peft_model(copy.deepcopy(base), scene.config(**options))


@pytest.mark.parametrize("start", ["subspace", "reference"])
def test_a_function_preserving_start_gives_the_quantised_base(base, scene, start):
    model = started(base, scene, svd_start=start)
    assert (logits(model) - logits(base)).abs().max() < 1e-5


def test_the_delta_start_adds_the_delta_to_the_quantised_base(base, scene):
    """Layer by layer: quantisation rounds what the layers after it are given."""
    model = started(base, scene)
    for name, layer in lora_layers(model, "default"):
        x = torch.randn(4, layer.in_features)
        delta = scene.factors[name.removeprefix("base_model.model.")].dense()
        expected = layer.get_base_layer()(x) + x @ delta.mT
        assert (layer(x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("start", ["delta", "subspace", "reference"])
def test_it_trains_and_the_base_stays(base, scene, start):
    model = started(base, scene, svd_start=start)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    before = adapter_weights(model)
    losses = train(model, steps=2)
    assert all(loss == loss for loss in losses)
    assert not any(
        torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items()
    )
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_dora_refreshes_its_magnitudes_from_the_dequantised_weight(base, scene):
    model = started(base, scene, use_dora=True)
    plain = started(base, scene)
    assert (logits(model) - logits(plain)).abs().max() < 0.05


def test_the_post_hoc_start_is_the_same(base, scene):
    configured = started(base, scene, svd_start="reference")
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=5, lora_alpha=10, target_modules=scene.targets, task_type="CAUSAL_LM"),
    )
    initialize_lora_from_factors(model, scene.file, start="reference")
    assert equal_bits(adapter_weights(model), adapter_weights(configured))
