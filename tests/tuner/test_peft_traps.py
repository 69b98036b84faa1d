"""Ways in which extending PEFT goes wrong silently; each has to work here or raise by name."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from support.mixture import Mixture
from support.peft_fixtures import (
    HELD_RANK,
    STARTS,
    Scene,
    adapted_layers,
    adapter_weights,
    aliased,
    equal_bits,
    has_lora_layers,
    logits,
    make_scene,
    train,
    tuned,
    write_factors,
)
from support.tiny_models import truncate, weight_of
from transformers import MixtralConfig, MixtralForCausalLM

import peft_svdinit
from peft_svdinit import LoriConfig, LowRankFactors, SvdLoraConfig, initialize_lora_from_factors
from peft_svdinit.factors import FactorsFile
from peft_svdinit.tuner.model import SvdLoraModel


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("traps"))


@contextlib.contextmanager
def leaving_the_base_alone(scene: Scene, error: type[Exception], names: str) -> Iterator:
    """Yield a fresh base that must be as it was after `error` was raised inside."""
    base = scene.model()
    frozen = base.get_submodule("model.embed_tokens").weight
    frozen.requires_grad_(False)
    with pytest.raises(error, match=names):
        yield base
    assert not has_lora_layers(base)
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), logits(scene.base))
    # PEFT freezes the base while it injects; what trained before trains again.
    idle = [name for name, weight in base.named_parameters() if not weight.requires_grad]
    assert idle == ["model.embed_tokens.weight"]
    # And the same model can be given an adapter after the mistake is repaired.
    get_peft_model(base, scene.config())


# Files that must not be used


def test_a_missing_factors_file_raises_and_leaves_the_base_alone(scene, tmp_path):
    missing = tmp_path / "missing.safetensors"
    with leaving_the_base_alone(scene, FileNotFoundError, "svd_factors") as base:
        get_peft_model(base, scene.config(svd_factors=str(missing)))


def test_a_missing_factors_file_is_noticed_before_peft_begins(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraModel, "inject_adapter", lambda *args: pytest.fail("PEFT has begun"))
    config = scene.config(svd_factors=str(tmp_path / "missing.safetensors"))
    with pytest.raises(FileNotFoundError):
        get_peft_model(scene.model(), config)


def test_an_unreachable_repository_raises_before_the_model_is_touched(scene):
    with leaving_the_base_alone(scene, FileNotFoundError, "'nobody/nothing'") as base:
        get_peft_model(base, scene.config(svd_factors="nobody/nothing"))


def test_a_folder_without_factors_is_refused(scene, tmp_path):
    with leaving_the_base_alone(scene, FileNotFoundError, r"factors\.safetensors") as base:
        get_peft_model(base, scene.config(svd_factors=str(tmp_path)))


def test_a_truncated_file_is_refused(scene, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(scene.file.read_bytes())
    truncate(broken)
    with leaving_the_base_alone(scene, ValueError, "not a readable safetensors file") as base:
        get_peft_model(base, scene.config(svd_factors=str(broken)))


def test_a_pickle_is_refused_with_the_conversion(scene, tmp_path):
    pickle = tmp_path / "factors.bin"
    pickle.write_bytes(b"\x80\x04.")
    with leaving_the_base_alone(scene, ValueError, r"factors\.bin.*weights_only=True") as base:
        get_peft_model(base, scene.config(svd_factors=str(pickle)))


def rewritten(scene: Scene, path, edit) -> str:
    """A copy of the factors file with its tensors edited, the header kept."""
    from safetensors import safe_open

    with safe_open(scene.file, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(scene.file)
    edit(tensors)
    save_file(tensors, path, header)
    return str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["U", "S", "Vh"])
def test_factors_that_are_not_finite_are_refused_by_layer(scene, tmp_path, part, value):
    def spoil(tensors):
        tensors[f"model.layers.1.mlp.down_proj.{part}"].view(-1)[0] = value

    file = rewritten(scene, tmp_path / "spoilt.safetensors", spoil)
    with leaving_the_base_alone(scene, ValueError, r"layers\.1\.mlp\.down_proj") as base:
        get_peft_model(base, scene.config(svd_factors=file))


def test_factors_of_another_shape_are_refused_by_layer(scene, tmp_path):
    def widen(tensors):
        key = "model.layers.1.mlp.down_proj.Vh"
        tensors[key] = torch.cat([tensors[key], tensors[key]], dim=1)

    file = rewritten(scene, tmp_path / "wide.safetensors", widen)
    names = r"layers\.1\.mlp\.down_proj.*\(16, 48\).*\(16, 24\)"
    with leaving_the_base_alone(scene, ValueError, names) as base:
        get_peft_model(base, scene.config(svd_factors=file))


def test_a_rank_above_what_the_file_holds_is_refused_by_layer(scene):
    names = rf"layers\.0.*r={HELD_RANK + 1} is above the {HELD_RANK} triplets.*rank_pattern"
    with leaving_the_base_alone(scene, ValueError, names) as base:
        get_peft_model(base, scene.config(r=HELD_RANK + 1))


def test_factors_of_another_base_of_the_same_shapes_are_refused(scene, tmp_path):
    other = make_scene(tmp_path).base
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    file = write_factors(tmp_path / "other.safetensors", other, scene.factors, name="other-base")
    with leaving_the_base_alone(scene, ValueError, r"\(other-base\)") as base:
        get_peft_model(base, scene.config(svd_factors=str(file)))
    model = scene.peft_model(svd_factors=str(file), svd_check_base=False)
    expected = logits(tuned(scene.base, scene.factors))
    assert (logits(model) - expected).abs().max() < 1e-4


# Coverage, both ways


def test_target_layers_without_factors_are_listed(scene):
    names = r"2 target layers without factors \(model\.layers\.0\.self_attn\.k_proj"
    with leaving_the_base_alone(scene, ValueError, names) as base:
        get_peft_model(base, scene.config(target_modules=[*scene.targets, "k_proj"]))


def test_factors_without_target_layer_are_listed(scene):
    names = r"2 factors without target layer \(model\.layers\.0\.mlp\.down_proj"
    with leaving_the_base_alone(scene, ValueError, names) as base:
        get_peft_model(base, scene.config(target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("coverage", ["strict", "partial"])
def test_factors_that_match_nothing_are_refused_whatever_the_coverage(scene, coverage):
    with leaving_the_base_alone(scene, ValueError, "match none of the 2 target layers") as base:
        get_peft_model(base, scene.config(target_modules=["o_proj"], svd_coverage=coverage))


def test_no_target_at_all_is_refused(scene):
    with leaving_the_base_alone(scene, ValueError, "nonesuch") as base:
        get_peft_model(base, scene.config(target_modules=["nonesuch"]))


@pytest.mark.parametrize("bad", ["k_proj", "input_layernorm"])
@pytest.mark.parametrize("first", [["q_proj", "v_proj", "down_proj"], ["down_proj"]], ids=len)
def test_a_failing_second_adapter_leaves_the_first_as_it_was(scene, first, bad):
    """Also where PEFT itself gives up in the middle of wrapping layers."""
    model = scene.peft_model(svd_start="reference", target_modules=first, svd_coverage="partial")
    train(model)
    expected, trainable = (
        logits(model),
        {name for name, weight in model.named_parameters() if weight.requires_grad},
    )
    with pytest.raises(ValueError, match=r"k_proj|RMSNorm.* is not supported"):
        model.add_adapter("second", scene.config(target_modules=[*scene.targets, bad]))
    assert list(model.peft_config) == ["default"]
    assert model.base_model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    found = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found == trainable
    assert not [name for name, _ in model.named_parameters() if ".second" in name]
    train(model)


# Layers that are not linear


LINEAR_ONLY = {"linear": LowRankFactors.from_delta(torch.ones(6, 8), 2)}


@pytest.mark.parametrize("name", ["embedding", "convolution", "attention"])
def test_a_layer_that_is_not_linear_is_named_when_it_has_no_factors(tmp_path, name):
    base = Mixture()
    file = write_factors(tmp_path / "f.safetensors", base, LINEAR_ONLY)
    config = SvdLoraConfig(r=2, target_modules=["linear", name], svd_factors=str(file))
    with pytest.raises(ValueError, match=rf"without factors \({name}"):
        get_peft_model(base, config)
    assert not has_lora_layers(base)


@pytest.mark.parametrize(("name", "kind"), [("embedding", "Embedding"), ("convolution", "Conv1d")])
def test_a_layer_that_is_not_linear_is_named_when_it_has_factors(name, kind):
    model = get_peft_model(Mixture(), LoraConfig(r=2, target_modules=["linear", name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    factors = {**LINEAR_ONLY, name: LowRankFactors.from_delta(torch.ones(8, 8), 2)}
    with pytest.raises(TypeError, match=rf"layer {name} is a {kind}.*target_modules"):
        initialize_lora_from_factors(model, factors)
    assert equal_bits(model.state_dict(), before)


def test_a_tied_head_without_factors_is_named(scene):
    names = r"1 target layers without factors \(lm_head\)"
    with leaving_the_base_alone(scene, ValueError, names) as base:
        get_peft_model(base, scene.config(target_modules=[*scene.targets, "lm_head"]))


def test_fused_experts_are_named():
    """Experts are one three-dimensional parameter, which has no delta of two factors."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    model = get_peft_model(base, config)
    (experts,) = [name for name in adapted_layers(model) if "experts" in name]
    attention = {"model.layers.0.self_attn.q_proj": LowRankFactors.from_delta(torch.eye(8), 2)}
    with pytest.raises(ValueError, match=rf"without factors \({experts}\)"):
        initialize_lora_from_factors(model, attention)
    named = {**attention, experts: LowRankFactors.from_delta(torch.eye(8), 2)}
    with pytest.raises(TypeError, match=rf"layer {experts} is a ParamWrapper"):
        initialize_lora_from_factors(model, named)


# What PEFT does around the start


def test_the_start_does_not_depend_on_the_random_state(scene):
    """PEFT's own randomised inits broke resumed runs, whose state differs."""
    for start in STARTS:
        torch.manual_seed(1)
        first = adapter_weights(scene.peft_model(svd_start=start))
        torch.manual_seed(2)
        assert equal_bits(adapter_weights(scene.peft_model(svd_start=start)), first)


def test_doras_magnitudes_are_the_norms_of_base_and_update(scene):
    model = scene.peft_model(use_dora=True)
    for name, layer in adapted_layers(model).items():
        delta = scene.factors[name].dense()
        norms = (layer.get_base_layer().weight + delta).norm(dim=1)
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [*({"svd_start": start} for start in STARTS), {"use_dora": True}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_low_cpu_mem_usage_gives_the_same_adapter(scene, options):
    low = get_peft_model(scene.model(), scene.config(**options), low_cpu_mem_usage=True)
    assert not [name for name, weight in low.named_parameters() if weight.is_meta]
    expected = scene.peft_model(**options)
    assert equal_bits(adapter_weights(low), adapter_weights(expected))
    assert torch.equal(logits(low), logits(expected))
    assert train(low, steps=1)[0] > 0


@pytest.mark.parametrize("start", STARTS)
def test_low_cpu_mem_usage_leaves_no_layer_without_memory_in_partial_coverage(
    scene, start, tmp_path
):
    some = {name: layer for name, layer in scene.factors.items() if "layers.0" in name}
    file = write_factors(tmp_path / "some.safetensors", scene.base, some)
    config = scene.config(svd_start=start, svd_factors=str(file), svd_coverage="partial")
    model = get_peft_model(scene.model(), config, low_cpu_mem_usage=True)
    assert not [name for name, weight in model.named_parameters() if weight.is_meta]
    expected = logits(tuned(scene.base, some if start == "delta" else {}))
    assert (logits(model) - expected).abs().max() < 1e-4


def test_a_low_cpu_mem_usage_second_adapter(scene):
    model = scene.peft_model()
    model.add_adapter("second", scene.config(svd_start="reference"), low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(scene.base))


@pytest.mark.parametrize("combination", ["svd", "linear", "cat", "ties_svd"])
def test_delta_adapters_can_be_combined(scene, combination):
    """The combination has a copy of the first config: it must not start from factors itself."""
    model = scene.peft_model()
    model.add_adapter("second", scene.config())
    model.set_adapter("second")
    train(model)
    model.add_weighted_adapter(
        ["default", "second"],
        [0.7, 0.3],
        "both",
        combination_type=combination,
        svd_rank=8,
        density=1.0,
    )
    assert type(model.peft_config["both"]) is LoraConfig
    assert isinstance(model.peft_config["default"], SvdLoraConfig)
    if combination == "ties_svd":
        return  # TIES drops disagreeing signs on purpose.
    dense = scene.model()
    for name, layer in adapted_layers(model, "both").items():
        weight = weight_of(dense, name)
        if combination == "linear":
            # PEFT sums the factors, each weighted by the root.
            weight += layer.get_delta_weight("both")
        else:
            weight += 0.7 * layer.get_delta_weight("default")
            weight += 0.3 * layer.get_delta_weight("second")
    model.set_adapter("both")
    assert (logits(model) - logits(dense)).abs().max() < 1e-4
    assert (logits(model) - logits(scene.base)).abs().max() > 0.1


def test_the_conversion_for_inits_that_move_the_base_is_refused(scene, tmp_path):
    """It would subtract the start from an adapter whose base still lacks it."""
    model = scene.peft_model()
    model.save_pretrained(str(tmp_path / "initial"))
    train(model)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )


def test_the_base_weights_are_never_written(scene):
    for options in ({}, {"svd_start": "reference"}, {"use_dora": True}):
        base = scene.model()
        before = {name: weight.clone() for name, weight in base.named_parameters()}
        model = get_peft_model(base, scene.config(**options))
        train(model)
        after = dict(model.unload().named_parameters())
        assert equal_bits(after, before)


# transformers' own adapters


@pytest.mark.parametrize("start", STARTS)
def test_add_adapter_of_transformers_saves_and_reloads(scene, start, tmp_path):
    model = scene.model()
    model.add_adapter(scene.config(svd_start=start))
    expected = scene.peft_model(svd_start=start)
    assert torch.equal(logits(model), logits(expected))
    trainable = [weight for name, weight in model.named_parameters() if "lora_" in name]
    assert all(weight.requires_grad for weight in trainable)
    train(model, optimizer=torch.optim.AdamW(trainable, lr=0.01))
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert SvdLoraConfig.from_pretrained(str(tmp_path)).svd_start == start
    reloaded = scene.model()
    reloaded.load_adapter(str(tmp_path))
    assert (logits(reloaded) - logits(model)).abs().max() < 1e-5
    model.disable_adapters()
    assert torch.equal(logits(model), logits(scene.base))


def test_add_adapter_of_transformers_takes_the_alias_and_the_post_hoc_start(scene):
    options: dict[str, Any] = {"r": HELD_RANK, "target_modules": scene.targets}
    by_string, later = scene.model(), scene.model()
    by_string.add_adapter(aliased(str(scene.file), **options))
    later.add_adapter(LoraConfig(**options))
    initialize_lora_from_factors(later, scene.file)
    assert torch.equal(logits(by_string), logits(later))
    expected = logits(tuned(scene.base, scene.factors))
    assert (logits(by_string) - expected).abs().max() < 1e-4


def test_a_failing_add_adapter_of_transformers_leaves_no_lora_layer(scene):
    model = scene.model()
    with pytest.raises(ValueError, match="r=6 is above"):
        model.add_adapter(scene.config(r=6))
    assert not has_lora_layers(model)
    assert torch.equal(logits(model), logits(scene.base))


def test_injection_in_place_starts_too(scene):
    model = inject_adapter_in_model(scene.config(), scene.model())
    expected = logits(tuned(scene.base, scene.factors))
    assert (logits(model) - expected).abs().max() < 1e-4


# Registration


@pytest.fixture
def tuner_mapping() -> Iterator[dict]:
    """PEFT's mapping, put back afterwards."""
    present = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    yield PEFT_TYPE_TO_TUNER_MAPPING
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = present
    peft_svdinit.register()


def test_importing_registers_and_registering_again_is_harmless(tuner_mapping):
    assert tuner_mapping[PeftType.LORA] is SvdLoraModel
    peft_svdinit.register()
    peft_svdinit.register()
    assert tuner_mapping[PeftType.LORA] is SvdLoraModel


def test_unregistering_gives_peft_its_tuner_back(scene, tuner_mapping):
    model = scene.peft_model(svd_start="reference")
    peft_svdinit.unregister()
    assert tuner_mapping[PeftType.LORA] is LoraModel
    stock = get_peft_model(scene.model(), LoraConfig(target_modules=scene.targets))
    assert type(stock.base_model) is LoraModel
    # Models made before go on working.
    train(model)
    peft_svdinit.unregister()
    peft_svdinit.register()
    assert tuner_mapping[PeftType.LORA] is SvdLoraModel


def test_a_foreign_tuner_is_neither_replaced_nor_removed(tuner_mapping):
    class Foreign(LoraModel):
        pass

    tuner_mapping[PeftType.LORA] = Foreign
    with pytest.raises(RuntimeError, match=r"Foreign.*peft_svdinit"):
        peft_svdinit.register()
    peft_svdinit.unregister()
    assert tuner_mapping[PeftType.LORA] is Foreign


def test_stock_configs_are_untouched_by_the_registration(scene, tuner_mapping):
    models = []
    for registered in (True, False):
        if not registered:
            peft_svdinit.unregister()
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=scene.targets, init_lora_weights="pissa")
        models.append(get_peft_model(scene.model(), config))
    found, expected = models
    assert equal_bits(get_peft_model_state_dict(found), get_peft_model_state_dict(expected))
    assert torch.equal(logits(found), logits(expected))
    assert type(found.base_model) is type(expected.base_model) is LoraModel
    assert vars(found.base_model).keys() == vars(expected.base_model).keys()
    assert get_model_status(found) == get_model_status(expected)
    assert repr(found) == repr(expected)
    # Whoever unpickles it need not have this package.
    assert b"peft_svdinit" not in pickle.dumps(found)


@pytest.mark.parametrize("ours", ["config", "alias", "lori", "post hoc"])
def test_a_stock_model_takes_an_adapter_of_ours_later(scene, tmp_path, ours):
    options: dict[str, Any] = {"r": HELD_RANK, "target_modules": scene.targets}
    config = {
        "config": scene.config(svd_start="reference"),
        "alias": aliased(str(scene.file), **options),
        "lori": LoriConfig(**options),
        "post hoc": LoraConfig(**options),
    }[ours]
    alone = get_peft_model(scene.model(), copy.deepcopy(config))
    model = get_peft_model(scene.model(), LoraConfig(**options, init_lora_weights=False))
    first = logits(model)
    with pytest.raises(FileNotFoundError):
        model.add_adapter("failing", scene.config(svd_factors="nobody/nothing"))
    assert type(model.base_model) is LoraModel
    model = copy.deepcopy(model)
    model.add_adapter("second", config)
    if ours == "post hoc":
        assert type(model.base_model) is LoraModel
        initialize_lora_from_factors(model, scene.file, adapter_name="second")
        initialize_lora_from_factors(alone, scene.file)
    assert type(model.base_model) is type(alone.base_model) is SvdLoraModel
    model.set_adapter("second")
    train(model)
    assert torch.equal(logits(model), (train(alone), logits(alone))[1])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(scene.base))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(scene.model(), str(tmp_path / "second"))
    assert type(loaded.base_model) is LoraModel
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    if ours in ("alias", "post hoc"):
        # For which the first adapter is a stock one for a while.
        model.add_weighted_adapter(["second", "default"], [1.0, 1.0], "both")
        assert type(model.base_model) is SvdLoraModel
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    model.add_adapter("third", LoraConfig(**options))
    assert type(model.base_model) is LoraModel
    merged = model.merge_and_unload(adapter_names=["default"])
    assert (logits(merged) - first).abs().max() < 1e-5


def test_the_factors_file_is_read_and_never_written(scene):
    before = scene.file.read_bytes()
    train(scene.peft_model())
    assert scene.file.read_bytes() == before
    assert len(FactorsFile(scene.file)) == len(scene.factors)


def test_a_tuner_that_is_not_ours_refuses_the_config_instead_of_starting_at_random(scene):
    config = scene.config()
    with pytest.raises(ValueError, match="svd_guided"):
        get_peft_model(scene.model(), config, mixed=True)
    peft_svdinit.unregister()
    try:
        with pytest.raises(ValueError, match="svd_guided"):
            get_peft_model(scene.model(), config)
    finally:
        peft_svdinit.register()
