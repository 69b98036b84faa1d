"""The reference start: an update that begins at zero with both factors off zero."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from support.peft_fixtures import (
    HELD_RANK,
    SPLITS,
    Scene,
    adapted_layers,
    adapter_weights,
    equal_bits,
    has_lora_layers,
    logits,
    make_scene,
    reloaded_to_train,
    tokens,
    train,
    tuned,
    write_factors,
)
from support.tiny_models import ARCHITECTURES, weight_of
from torch import Tensor, nn

from peft_svdinit import LowRankFactors, initialize_lora_from_factors


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, Scene]:
    folder = tmp_path_factory.mktemp("reference")
    return {name: make_scene(folder, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama(scenes) -> Scene:
    return scenes["llama"]


def reference_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if "svd_reference" in name}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_in_train_mode_preserves_the_function_at_step_zero(scenes, architecture):
    """One mask for both products: dropping x differently would leave noise of the delta's size."""
    scene = scenes[architecture]
    model = scene.peft_model(svd_start="reference", lora_dropout=0.5).train()
    base = scene.model().train()
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
        expected = base(input_ids=tokens()).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("split", SPLITS)
def test_the_update_is_the_change_of_the_product(llama, split):
    """Against the dense twin: base + scaling * (B A - B0 A0) in float64."""
    model = llama.peft_model(svd_start="reference", svd_split=split)
    start = adapter_weights(model)
    train(model, learning_rate=0.03)
    dense = llama.model()
    for name, layer in adapted_layers(model).items():
        keys = [f"base_model.model.{name}.lora_{part}.default.weight" for part in "BA"]
        now, initial = (
            weights[keys[0]].double() @ weights[keys[1]].double()
            for weights in (adapter_weights(model), start)
        )
        weight = weight_of(dense, name)
        weight += (layer.scaling["default"] * (now - initial)).to(weight.dtype)
    assert (logits(model) - logits(dense)).abs().max() < 1e-5
    assert (logits(dense) - logits(llama.base)).abs().max() > 0.05


def test_both_factors_receive_gradients_at_once(llama):
    model = llama.peft_model(svd_start="reference", svd_split="balanced", r=3)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad.abs().max() > 0, name


def test_the_frozen_factors_stay_frozen_and_out_of_the_state_dict(llama):
    model = llama.peft_model(svd_start="reference")
    before = {name: value.clone() for name, value in reference_buffers(model).items()}
    assert len(before) == 2 * len(llama.factors)
    train(model)
    assert equal_bits(reference_buffers(model), before)
    assert not [key for key in model.state_dict() if "svd_reference" in key]


def test_deleting_the_adapter_drops_the_frozen_factors(llama):
    model = llama.peft_model(svd_start="reference")
    model.add_adapter("second", llama.config(svd_start="reference"))
    model.delete_adapter("default")
    assert {name.rpartition(".")[2] for name in reference_buffers(model)} == {"second"}
    assert torch.equal(logits(model), logits(llama.base))
    model.delete_adapter("second")
    assert not reference_buffers(model)


def test_the_frozen_factors_follow_the_model_to_another_precision(llama):
    model = llama.peft_model(svd_start="reference").double()
    assert {value.dtype for value in reference_buffers(model).values()} == {torch.float64}
    expected = logits(llama.model().double())
    assert torch.equal(logits(model), expected)


def test_a_deep_copy_is_a_model_of_its_own(llama):
    model = llama.peft_model(svd_start="reference")
    other = copy.deepcopy(model)
    train(model)
    assert torch.equal(logits(other), logits(llama.base))


def test_the_saved_state_is_trained_factors_above_initial_ones(llama):
    model = llama.peft_model(svd_start="reference")
    start = adapter_weights(model)
    train(model)
    saved, now = get_peft_model_state_dict(model), adapter_weights(model)
    for key, stacked in saved.items():
        name = key.replace(".weight", ".default.weight")
        dim = 0 if "lora_A" in key else 1
        upper, lower = stacked.split(HELD_RANK, dim=dim)
        assert torch.equal(upper, now[name])
        assert torch.equal(lower, start[name] if dim == 0 else -start[name])


def test_a_state_dict_goes_out_and_in_again_exactly(llama):
    trained = llama.peft_model(svd_start="reference")
    train(trained)
    saved = get_peft_model_state_dict(trained)
    fresh = llama.peft_model(svd_start="reference")
    result = set_peft_model_state_dict(fresh, saved)
    assert not result.unexpected_keys
    assert equal_bits(adapter_weights(fresh), adapter_weights(trained))
    assert torch.equal(logits(fresh), logits(trained))


def test_a_gathered_state_dict_is_what_gets_saved(llama, tmp_path):
    """Sharded training hands over full tensors while the layers hold shards."""
    model = llama.peft_model(svd_start="reference")
    train(model)
    gathered = {key: value.clone() for key, value in model.state_dict().items()}
    expected = get_peft_model_state_dict(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(float("nan"))
    found = get_peft_model_state_dict(model, state_dict=gathered)
    assert equal_bits(found, expected)
    assert get_peft_model_state_dict(model, state_dict={}) == {}


def test_loading_an_adapter_that_started_elsewhere_is_refused_by_layer(llama, tmp_path):
    trained = llama.peft_model(svd_start="reference")
    train(trained)
    saved = get_peft_model_state_dict(trained)
    other = {name: layer.truncated(HELD_RANK - 1) for name, layer in llama.factors.items()}
    file = write_factors(tmp_path / "other.safetensors", llama.base, other)
    lower = llama.peft_model(
        svd_start="reference", svd_factors=str(file), r=HELD_RANK - 1, lora_alpha=8
    )
    with pytest.raises(
        ValueError, match=r"layers\.0.*rank 4 has 8 rows in lora_A, this one has 10"
    ):
        set_peft_model_state_dict(lower, saved)
    split = llama.peft_model(svd_start="reference", svd_split="balanced")
    with pytest.raises(ValueError, match=r"layers\.0.*other factors than svd_factors"):
        set_peft_model_state_dict(split, saved)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_goes_on_from_a_saved_adapter_and_its_own_config(
    llama, tmp_path, low_cpu_mem_usage
):
    trained = llama.peft_model(svd_start="reference")
    train(trained)
    trained.save_pretrained(str(tmp_path))
    reloaded_to_train(llama, tmp_path, trained, low_cpu_mem_usage=low_cpu_mem_usage)


def test_gradient_checkpointing_changes_nothing(llama):
    model = llama.peft_model(svd_start="reference")
    expected = train(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    assert train(model) == expected


def test_partial_coverage_saves_every_layer_at_the_doubled_rank(llama, tmp_path):
    """The saved config has one rank: a layer without factors must not keep the single one."""
    some = {name: layer for name, layer in llama.factors.items() if "layers.0" in name}
    file = write_factors(tmp_path / "some.safetensors", llama.base, some)
    options = {"svd_start": "reference", "svd_factors": str(file), "svd_coverage": "partial"}
    model = llama.peft_model(**options)
    assert torch.equal(logits(model), logits(llama.base))
    train(model)
    saved = get_peft_model_state_dict(model)
    assert {min(value.shape) for value in saved.values()} <= {2 * HELD_RANK, 8}
    stock = get_peft_model(llama.model(), model.peft_config["default"].stock())
    set_peft_model_state_dict(stock, saved)
    assert (logits(stock) - logits(model)).abs().max() < 1e-5
    # The layers without factors start at random, and a resumed run need not draw the same.
    torch.manual_seed(123)
    resumed = llama.peft_model(**options)
    set_peft_model_state_dict(resumed, saved)
    assert torch.equal(logits(resumed), logits(model))


def test_a_merged_reference_disables_back_to_the_base(llama):
    model = llama.peft_model(svd_start="reference")
    train(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert (logits(model) - logits(llama.base)).abs().max() < 1e-5


def test_scaling_an_adapter_scales_its_change_only(llama):
    model = llama.peft_model(svd_start="reference")
    for layer in adapted_layers(model).values():
        layer.scale_layer(0.5)
    assert torch.equal(logits(model), logits(llama.base))


@pytest.mark.parametrize("combination", ["svd", "linear", "cat", "ties_svd"])
def test_a_reference_adapter_in_a_combination_is_refused_by_name(llama, combination):
    model = llama.peft_model()
    model.add_adapter("second", llama.config(svd_start="reference"))
    with pytest.raises(ValueError, match=r"'second' starts as svd_start=\"reference\""):
        model.add_weighted_adapter(
            ["default", "second"], [1.0, 1.0], "both", combination_type=combination, density=0.5
        )
    assert "both" not in model.peft_config


def test_what_cannot_subtract_is_named():
    """Attention modules of torch apply their LoRA by merging B A, whatever the variant."""

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    base = Attentive()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["attention"]))
    factors = {
        "attention": LowRankFactors.from_delta(torch.randn(24, 8), 2),
        "attention.base_layer.out_proj": LowRankFactors.from_delta(torch.randn(8, 8), 2),
    }
    with pytest.raises(TypeError, match="attention is a MultiheadAttention"):
        initialize_lora_from_factors(model, factors, start="reference")


def test_unloading_after_a_reference_leaves_no_trace(llama):
    base = llama.model()
    model = get_peft_model(base, llama.config(svd_start="reference"))
    unloaded = model.unload()
    assert unloaded is base and not has_lora_layers(base)
    assert not reference_buffers(base)
    assert torch.equal(logits(base), logits(tuned(llama.base, {})))
