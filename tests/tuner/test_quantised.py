"""Starts over bitsandbytes' quantised bases, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from support.peft_fixtures import (
    HELD_RANK,
    Scene,
    adapted_layers,
    adapter_weights,
    equal_bits,
    logits,
    make_scene,
    train,
)
from support.quantised import KINDS, quantised

from peft_svdinit import base_samples, initialize_lora_from_factors, weight_factors


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, scene) -> str:
    try:
        logits(quantised(scene.base, request.param))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no {request.param} on this CPU: {error}")
    return request.param


def started(scene: Scene, kind: str, **options: Any) -> Any:
    return get_peft_model(quantised(scene.base, kind), scene.config(**options))


@pytest.mark.parametrize("start", ["subspace", "reference"])
def test_a_function_preserving_start_gives_the_quantised_base(scene, kind, start):
    model = started(scene, kind, svd_start=start)
    assert (logits(model) - logits(quantised(scene.base, kind))).abs().max() < 1e-5


def test_the_delta_start_adds_the_delta_to_the_quantised_base(scene, kind):
    """Layer by layer: quantisation rounds what the layers after it are given."""
    model = started(scene, kind)
    for name, layer in adapted_layers(model).items():
        x = torch.randn(4, layer.in_features)
        delta = scene.factors[name].dense()
        expected = layer.get_base_layer()(x) + x @ delta.mT
        assert (layer(x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("start", ["delta", "subspace", "reference"])
def test_it_trains_and_the_base_stays(scene, kind, start):
    base = prepare_model_for_kbit_training(
        quantised(scene.base, kind), use_gradient_checkpointing=False
    )
    expected = logits(base)
    model = get_peft_model(base, scene.config(svd_start=start))
    before = adapter_weights(model)
    assert torch.isfinite(torch.tensor(train(model, steps=2))).all()
    after = adapter_weights(model)
    assert not [name for name in after if torch.equal(after[name], before[name])]
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_dora_takes_its_magnitudes_from_the_dequantised_weight(scene, kind):
    model = started(scene, kind, use_dora=True)
    for name, layer in adapted_layers(model).items():
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        delta = scene.factors[name].dense()
        found = layer.lora_magnitude_vector["default"].weight
        assert (found - (weight + delta).norm(dim=1)).abs().max() < 1e-2


def test_the_post_hoc_start_is_the_same(scene, kind):
    configured = started(scene, kind, svd_start="reference")
    model = get_peft_model(
        quantised(scene.base, kind),
        LoraConfig(
            r=HELD_RANK,
            lora_alpha=2 * HELD_RANK,
            target_modules=scene.targets,
            task_type="CAUSAL_LM",
        ),
    )
    initialize_lora_from_factors(model, scene.file, start="reference")
    assert equal_bits(adapter_weights(model), adapter_weights(configured))


def test_merging_a_reference_changes_the_quantised_weight_by_the_change_of_the_product(scene, kind):
    """Within the rounding of quantising again."""
    model = started(scene, kind, svd_start="reference")
    train(model, learning_rate=0.05)
    trained, untrained = logits(model), logits(quantised(scene.base, kind))
    merged = logits(model.merge_and_unload())
    assert (merged - trained).norm() < 0.5 * (trained - untrained).norm()


def test_a_weight_that_bitsandbytes_repacked_is_not_read_as_if_it_were_not(scene):
    base = quantised(scene.base, "4bit")
    layer: Any = base.get_submodule(next(iter(scene.factors)))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked by bitsandbytes"):
        weight_factors(base, rank=2)
    with pytest.raises(RuntimeError, match="repacked by bitsandbytes"):
        get_peft_model(base, scene.config(use_dora=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_not_compared_and_leaves_no_sample(scene, kind):
    """In whatever it is stored: packed numbers of 16 bits say nothing of the weight, either."""
    model = quantised(scene.base, kind)
    assert base_samples(model, scene.factors) == {}
    if kind == "4bit":
        for name in scene.factors:
            packed = model.get_parameter(f"{name}.weight")
            packed.data = packed.data.flatten().view(torch.bfloat16)[:, None]
            assert packed.is_floating_point() and packed.dim() == 2
        assert base_samples(model, scene.factors) == {}
        get_peft_model(model, scene.config(svd_start="subspace"))
