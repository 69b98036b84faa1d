"""Starts in real PEFT models: the function at step 0, and all that PEFT does with adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from support.peft_fixtures import (
    HELD_RANK,
    SPLITS,
    STARTS,
    TEACHER_RANK,
    Scene,
    adapted_layers,
    adapter_weights,
    equal_bits,
    has_lora_layers,
    logits,
    make_scene,
    reloaded_to_train,
    teacher_factors,
    tiny_base,
    tokens,
    train,
    tuned,
    write_factors,
)
from support.tiny_models import ARCHITECTURES, weight_of

from peft_svdinit import (
    FactorsFile,
    LoriConfig,
    SvdGuided,
    SvdLoraConfig,
    initialize_lora_from_factors,
)
from peft_svdinit.tuner import lora_scalings
from peft_svdinit.tuner.svd_start import initialize_layers

TEACHER_TOLERANCE, BASE_TOLERANCE = 1e-4, 1e-5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, Scene]:
    folder = tmp_path_factory.mktemp("tuner")
    return {name: make_scene(folder, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def llama(scenes) -> Scene:
    return scenes["llama"]


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def teacher_logits(scene: Scene, ids: torch.Tensor | None = None) -> torch.Tensor:
    return logits(tuned(scene.base, scene.factors), ids)


def expected_logits(scene: Scene, start: str, ids: torch.Tensor | None = None) -> torch.Tensor:
    return teacher_logits(scene, ids) if start == "delta" else logits(scene.base, ids)


def tolerance(start: str) -> float:
    return TEACHER_TOLERANCE if start == "delta" else BASE_TOLERANCE


# The function at step 0


def test_the_teacher_is_another_function_than_the_base(scenes):
    for scene in scenes.values():
        assert largest_difference(teacher_logits(scene), logits(scene.base)) > 0.5


@pytest.mark.parametrize("rank", [TEACHER_RANK, HELD_RANK])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_delta_begins_at_the_teacher_and_the_others_at_the_base(
    scenes, architecture, start, split, rank
):
    scene = scenes[architecture]
    model = scene.peft_model(r=rank, svd_start=start, svd_split=split)
    found = logits(model)
    assert largest_difference(found, expected_logits(scene, start)) < tolerance(start)


def test_a_rank_below_the_teachers_begins_at_the_truncated_delta(llama):
    model = llama.peft_model(r=2, lora_alpha=5)
    truncated = {name: layer.truncated(2) for name, layer in llama.factors.items()}
    expected = logits(tuned(llama.base, truncated))
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE
    assert largest_difference(expected, teacher_logits(llama)) > 0.1


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rslora_keeps_the_start(scenes, architecture, start):
    scene = scenes[architecture]
    model = scene.peft_model(use_rslora=True, svd_start=start)
    scalings = lora_scalings(model)
    assert set(scalings.values()) == {2 * HELD_RANK / math.sqrt(HELD_RANK)}
    assert largest_difference(logits(model), expected_logits(scene, start)) < tolerance(start)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_rank_and_alpha_patterns_keep_the_start(llama, start, use_rslora):
    patterns = {
        "rank_pattern": {"q_proj": TEACHER_RANK, "layers.1.mlp.down_proj": HELD_RANK - 1},
        "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.v_proj": 1},
    }
    model = llama.peft_model(svd_start=start, use_rslora=use_rslora, **patterns)
    ranks = [layer.r["default"] for layer in adapted_layers(model).values()]
    assert {HELD_RANK, TEACHER_RANK, HELD_RANK - 1} == set(ranks)
    assert len(set(lora_scalings(model).values())) > 2
    assert largest_difference(logits(model), expected_logits(llama, start)) < tolerance(start)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dora_begins_at_the_teacher_since_magnitudes_are_those_of_the_updated_weight(
    scenes, architecture, split
):
    scene = scenes[architecture]
    model = scene.peft_model(use_dora=True, svd_split=split)
    found = largest_difference(logits(model), teacher_logits(scene))
    assert found < TEACHER_TOLERANCE


def test_dora_on_a_subspace_start_begins_at_the_base(llama):
    model = llama.peft_model(use_dora=True, svd_start="subspace")
    assert largest_difference(logits(model), logits(llama.base)) < BASE_TOLERANCE


def test_subspace_inherits_the_directions_and_no_progress(llama):
    model = llama.peft_model(svd_start="subspace")
    for name, layer in adapted_layers(model).items():
        factors = llama.factors[name]
        assert torch.equal(layer.lora_A["default"].weight, factors.Vh)
        assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("start", ["delta", "reference"])
def test_a_trainable_lora_bias_starts_at_zero_and_is_saved_once(llama, tmp_path, start):
    base = tiny_base("llama", attention_bias=True)
    factors = {name: layer for name, layer in llama.factors.items() if "self_attn" in name}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)
    model = get_peft_model(copy.deepcopy(base), config)
    initialize_lora_from_factors(model, factors, start=start)
    expected = logits(tuned(base, factors if start == "delta" else {}))
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert largest_difference(logits(loaded), logits(model)) < BASE_TOLERANCE
    merged = logits(model.merge_and_unload())
    assert largest_difference(merged, logits(loaded)) < BASE_TOLERANCE


# Gradients and parameters


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("start", STARTS)
def test_every_row_and_column_of_the_factors_moves_within_two_steps(llama, start, split, options):
    if start == "reference" and options:
        pytest.skip("refused")
    model = llama.peft_model(svd_start=start, svd_split=split, **options)
    before = adapter_weights(model)
    train(model, steps=2)
    for name, weight in adapter_weights(model).items():
        moved = weight != before[name]
        assert moved.any(), name
        # Also the directions of the teacher whose singular value is zero.
        if "lora_A" in name:
            assert moved.any(dim=1).all(), name
        if "lora_B" in name:
            assert moved.any(dim=0).all(), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"svd_start": "reference"}])
def test_exactly_the_adapters_parameters_train(llama, options):
    model = llama.peft_model(**options)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == set(adapter_weights(model))
    stock = get_peft_model(
        llama.model(),
        LoraConfig(
            r=HELD_RANK,
            target_modules=llama.targets,
            task_type="CAUSAL_LM",
            use_dora=bool(options.get("use_dora")),
        ),
    )
    assert trainable == {name for name, weight in stock.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_post_hoc_start_keeps_the_parameters_that_an_optimizer_holds(llama, use_dora):
    model = get_peft_model(
        llama.model(), LoraConfig(r=4, target_modules=llama.targets, use_dora=use_dora)
    )
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    initialize_lora_from_factors(model, llama.file)
    after = [weight for weight in model.parameters() if weight.requires_grad]
    assert list(map(id, trainable)) == list(map(id, after))
    before = adapter_weights(model)
    train(model, steps=2, optimizer=optimizer)
    assert all(
        not torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items()
    )


@pytest.mark.parametrize("start", STARTS)
def test_the_saved_keys_are_those_of_a_stock_adapter(llama, start):
    stock = get_peft_model(
        llama.model(), LoraConfig(r=4, target_modules=llama.targets, task_type=TaskType.CAUSAL_LM)
    )
    found = get_peft_model_state_dict(llama.peft_model(svd_start=start))
    assert found.keys() == get_peft_model_state_dict(stock).keys()


# Precision


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("start", STARTS)
def test_over_a_bf16_base_the_float32_adapter_holds_unrounded_factors(llama, start, split):
    model = get_peft_model(
        llama.model().to(torch.bfloat16), llama.config(svd_start=start, svd_split=split)
    )
    initializer = SvdGuided(start, split)
    for name, layer in adapted_layers(model).items():
        factors = llama.factors[name]
        expected = initializer(factors, rank=HELD_RANK, scaling=2.0)
        for part, value in ((layer.lora_A, expected.lora_A), (layer.lora_B, expected.lora_B)):
            assert part["default"].weight.dtype == torch.float32
            assert torch.equal(part["default"].weight, value)
        if start == "reference":
            assert layer.svd_reference_A["default"].dtype == torch.float32
            assert torch.equal(layer.svd_reference_A["default"], expected.lora_A)
            assert torch.equal(layer.svd_reference_B["default"], expected.lora_B)
    assert torch.isfinite(torch.tensor(train(model))).all()


@pytest.mark.parametrize("start", STARTS)
def test_without_the_widening_the_adapter_is_the_rounded_factors(llama, start):
    model = get_peft_model(
        llama.model().to(torch.bfloat16),
        llama.config(svd_start=start),
        autocast_adapter_dtype=False,
    )
    for name, layer in adapted_layers(model).items():
        factors = llama.factors[name]
        expected = SvdGuided(start)(factors, rank=HELD_RANK, scaling=2.0)
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16
        assert torch.equal(layer.lora_A["default"].weight, expected.lora_A.bfloat16())
    if start != "delta":
        base = logits(llama.model().to(torch.bfloat16))
        assert torch.equal(logits(model), base)
    assert torch.isfinite(torch.tensor(train(model))).all()


@pytest.mark.parametrize("start", ["subspace", "reference"])
def test_under_autocast_a_function_preserving_start_is_exact(llama, start):
    model, base = llama.peft_model(svd_start=start), llama.base
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base))


def test_under_autocast_the_delta_start_is_the_teacher_within_bf16(llama):
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(llama.peft_model())
    # Logits are up to about 3, bfloat16 has 8 bits, and two layers add up.
    assert largest_difference(found, teacher_logits(llama)) < 0.1


@pytest.mark.parametrize("start", STARTS)
def test_loading_weights_into_a_half_precision_adapter_keeps_them(llama, tmp_path, start):
    """PEFT widens the adapter when it loads one; that is no second start."""
    model = get_peft_model(
        llama.model().to(torch.bfloat16),
        llama.config(svd_start=start),
        autocast_adapter_dtype=False,
    )
    train(model, learning_rate=0.05)
    trained = adapter_weights(model)
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    found = adapter_weights(model)
    assert all(torch.equal(found[name].to(trained[name]), trained[name]) for name in trained)


# Several adapters


@pytest.mark.parametrize("start", STARTS)
def test_disabling_the_adapter_gives_the_base_exactly(llama, start):
    model = llama.peft_model(svd_start=start)
    train(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama.base))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_adapter_starts_on_its_own_and_switches(scenes, architecture):
    scene = scenes[architecture]
    model = scene.peft_model(svd_start="reference")
    model.add_adapter("second", scene.config(r=TEACHER_RANK))
    train(model)
    trained = logits(model)
    model.set_adapter("second")
    assert largest_difference(logits(model), teacher_logits(scene)) < TEACHER_TOLERANCE
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)


def test_a_second_adapter_beside_a_stock_one(llama):
    model = get_peft_model(llama.model(), LoraConfig(r=2, target_modules=llama.targets))
    first = logits(model)
    model.add_adapter("second", llama.config())
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert largest_difference(logits(model), teacher_logits(llama)) < TEACHER_TOLERANCE


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"svd_start": "reference"}])
def test_an_inactive_second_adapter_does_not_train(llama, options):
    model = llama.peft_model()
    model.add_adapter("second", llama.config(**options))
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == set(adapter_weights(model, "default"))


def test_each_batch_row_can_have_its_own_adapter(llama):
    model = llama.peft_model(svd_start="reference")
    train(model)
    model.add_adapter("second", llama.config())
    ids = tokens(batch=4)
    expected = [logits(model, ids)[0], logits(llama.base, ids)[1]]
    model.set_adapter("second")
    expected += [logits(model, ids)[2]]
    found = logits(model, ids, adapter_names=["default", "__base__", "second", "default"])
    for row, wanted in enumerate(expected):
        assert largest_difference(found[row], wanted) < BASE_TOLERANCE


def test_adapters_can_be_saved_one_by_one(llama, tmp_path):
    model = llama.peft_model(svd_start="reference")
    model.add_adapter("second", llama.config())
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    assert (tmp_path / "second" / "svdinit_config.json").is_file()
    assert not (tmp_path / "svdinit_config.json").exists()


# Merging


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_and_unmerging(scenes, architecture, start, safe_merge):
    scene = scenes[architecture]
    model = scene.peft_model(svd_start=start)
    train(model)
    trained = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert largest_difference(logits(model), trained) < BASE_TOLERANCE
    model.unmerge_adapter()
    assert largest_difference(logits(model), trained) < BASE_TOLERANCE
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not has_lora_layers(merged)
    assert largest_difference(logits(merged), trained) < BASE_TOLERANCE


def test_two_adapters_merge_together(llama):
    model = llama.peft_model(svd_start="reference")
    train(model)
    model.add_adapter("second", llama.config())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = model.merge_and_unload()
    assert largest_difference(logits(merged), both) < BASE_TOLERANCE


def test_unloading_gives_the_base_exactly(llama):
    model = llama.peft_model(svd_start="reference")
    train(model)
    assert torch.equal(logits(model.unload()), logits(llama.base))


# Determinism


def test_two_runs_with_one_seed_are_equal_bit_by_bit(scenes):
    for scene in scenes.values():
        for start in STARTS:
            runs = []
            for _ in range(2):
                torch.manual_seed(3)
                model = scene.peft_model(svd_start=start, lora_dropout=0.1)
                initial = adapter_weights(model)
                runs.append((initial, train(model)))
            assert equal_bits(runs[0][0], runs[1][0])
            assert runs[0][1] == runs[1][1]


# The post-hoc function


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_post_hoc_start_equals_the_configs_bit_by_bit(
    scenes, architecture, start, split, in_memory, tmp_path
):
    scene = scenes[architecture]
    config = LoraConfig(
        r=HELD_RANK,
        lora_alpha=2 * HELD_RANK,
        target_modules=scene.targets,
        task_type="CAUSAL_LM",
    )
    post_hoc = get_peft_model(scene.model(), config)
    initialize_lora_from_factors(
        post_hoc, scene.factors if in_memory else scene.file, start=start, split=split
    )
    configured = scene.peft_model(svd_start=start, svd_split=split)
    assert equal_bits(adapter_weights(post_hoc), adapter_weights(configured))
    if start == "reference":
        assert train(post_hoc) == train(configured)
    post_hoc.save_pretrained(str(tmp_path / "post_hoc"))
    configured.save_pretrained(str(tmp_path / "configured"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "post_hoc" / name).read_bytes() == (
        tmp_path / "configured" / name
    ).read_bytes()
    name = "adapter_config.json"
    assert (tmp_path / "post_hoc" / name).read_text() == (
        tmp_path / "configured" / name
    ).read_text()


def test_the_post_hoc_start_of_an_unknown_adapter_is_refused(llama):
    model = llama.peft_model()
    with pytest.raises(ValueError, match="adapter_name='other'"):
        initialize_lora_from_factors(model, llama.file, adapter_name="other")
    with pytest.raises(ValueError, match="adapter_name='default'"):
        initialize_lora_from_factors(llama.model(), llama.file)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"start": "x"}, "svd_start"),
        ({"split": "x"}, "svd_split"),
        ({"coverage": "x"}, "svd_coverage"),
    ],
)
def test_the_post_hoc_start_refuses_unknown_options(llama, options, names):
    model = llama.peft_model()
    before = adapter_weights(model)
    with pytest.raises(ValueError, match=names):
        initialize_lora_from_factors(model, llama.file, **options)
    assert equal_bits(adapter_weights(model), before)


def test_the_post_hoc_start_of_a_merged_adapter_is_refused(llama):
    """Unmerging would subtract the new start from a base that the old one was added to."""
    model = llama.peft_model()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"layers\.0.*merged"):
        initialize_lora_from_factors(model, llama.file, check_base=False)
    model.unmerge_adapter()


@pytest.mark.parametrize(
    ("config_class", "options", "names"),
    [
        (LoriConfig, {"lori_density": 0.25}, "'default' is a LoRI adapter.*with a LoraConfig"),
        (LoriConfig, {"lori_density": 1.0}, "'default' is a LoRI adapter.*lori_start"),
        (LoraConfig, {"init_lora_weights": "mica"}, r"layer model\.layers\.0.*keeps lora_B frozen"),
    ],
)
def test_the_post_hoc_start_of_a_kind_that_freezes_a_factor_is_refused(
    llama, config_class, options, names
):
    config = config_class(r=HELD_RANK, target_modules=llama.targets, **options)
    model = get_peft_model(llama.model(), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for factors in (llama.factors, llama.file):
        with pytest.raises(ValueError, match=names):
            initialize_lora_from_factors(model, factors)
    # The tuner's own function sees the layers alone.
    with pytest.raises(ValueError, match=r"layer model\.layers\.0.*keeps lora_[AB] frozen"):
        initialize_layers(model, llama.factors, "default", SvdGuided())
    assert equal_bits(model.state_dict(), before)
    assert model.peft_config["default"] is config


def test_the_post_hoc_start_of_another_method_than_lora_is_refused(llama):
    model = get_peft_model(llama.model(), LoKrConfig(r=4, target_modules=llama.targets))
    with pytest.raises(TypeError, match="adapter_name='default' was made with a LoKrConfig"):
        initialize_lora_from_factors(model, llama.factors)


@pytest.mark.parametrize("moved", ["pissa", "olora"])
def test_the_post_hoc_start_over_a_moved_base_is_refused(llama, moved):
    model = get_peft_model(
        llama.model(), LoraConfig(r=4, target_modules=llama.targets, init_lora_weights=moved)
    )
    with pytest.raises(ValueError, match=f"init_lora_weights='{moved}'"):
        initialize_lora_from_factors(model, llama.factors)


def test_a_later_start_replaces_a_reference(llama):
    model = llama.peft_model(svd_start="reference")
    initialize_lora_from_factors(model, llama.factors, start="delta")
    assert largest_difference(logits(model), teacher_logits(llama)) < TEACHER_TOLERANCE
    assert not [name for name, _ in model.named_buffers() if "svd_reference" in name]
    initialize_lora_from_factors(model, llama.factors, start="reference")
    assert largest_difference(logits(model), logits(llama.base)) < BASE_TOLERANCE


@pytest.mark.parametrize("start", STARTS)
def test_a_later_start_with_fewer_factors_replaces_every_reference(llama, tmp_path, start):
    """A trained A and B mean the difference to a reference; without it they mean nothing."""
    model = llama.peft_model(svd_start="reference")
    train(model)
    some = {name: layer for name, layer in llama.factors.items() if "layers.0" in name}
    initialize_lora_from_factors(model, some, start=start, coverage="partial")
    expected = logits(tuned(llama.base, some if start == "delta" else {}))
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(llama.model(), str(tmp_path))
    assert largest_difference(logits(loaded), logits(model)) < BASE_TOLERANCE


# Factors in memory, of which no file tells


def started_in_memory(scene: Scene, start: Any, **options: Any) -> Any:
    config = LoraConfig(
        r=HELD_RANK, lora_alpha=8, target_modules=scene.targets, task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(scene.model(), config)
    initialize_lora_from_factors(model, scene.factors, start=start)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("start", "options"),
    [*((start, {}) for start in STARTS), ("delta", {"use_dora": True})],
)
def test_training_goes_on_where_the_factors_were_in_memory(
    llama, tmp_path, start, options, low_cpu_mem_usage
):
    model = started_in_memory(llama, start, **options)
    train(model)
    model.save_pretrained(str(tmp_path))
    sidecar = json.loads((tmp_path / "svdinit_config.json").read_text())
    assert sidecar["svd_factors"] == "<factors in memory>"
    loaded = reloaded_to_train(llama, tmp_path, model, low_cpu_mem_usage=low_cpu_mem_usage)
    # What is loaded is saved as it was, and loads again.
    for name, adapter in (("first", model), ("second", loaded)):
        adapter.save_pretrained(str(tmp_path / name))
    saved = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")
    ]
    assert saved[0] == saved[1]
    assert SvdLoraConfig.from_pretrained(str(tmp_path / "second")).svd_start == start


@pytest.mark.parametrize("start", STARTS)
def test_a_new_adapter_needs_factors_where_the_saved_one_had_them_in_memory(llama, tmp_path, start):
    model = started_in_memory(llama, start)
    model.save_pretrained(str(tmp_path))
    config = SvdLoraConfig.from_pretrained(str(tmp_path))
    for useless in (config, copy.deepcopy(config), model.peft_config["default"]):
        base = llama.model()
        names = r"never in a file; give svd_factors.*PeftModel\.from_pretrained\(base"
        with pytest.raises(ValueError, match=names):
            get_peft_model(base, useless)
        assert not has_lora_layers(base)
    # What from_pretrained advises for other options.
    changed = dataclasses.replace(config, lora_dropout=0.1)
    again = PeftModel.from_pretrained(llama.model(), str(tmp_path), config=changed)
    assert equal_bits(adapter_weights(again), adapter_weights(model))
    given = dataclasses.replace(config, svd_factors=str(llama.file))
    assert equal_bits(adapter_weights(get_peft_model(llama.model(), given)), adapter_weights(model))


def test_weights_that_are_never_loaded_are_no_silent_start(llama, tmp_path):
    started_in_memory(llama, "delta").save_pretrained(str(tmp_path))
    config = SvdLoraConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False  # As a loader says that saved weights will be trained.
    assert logits(get_peft_model(llama.model(), config)).isnan().all()


def test_an_opened_factors_file_is_named_in_what_is_saved(llama, tmp_path):
    model = get_peft_model(llama.model(), LoraConfig(r=4, target_modules=llama.targets))
    initialize_lora_from_factors(model, FactorsFile(llama.file))
    model.save_pretrained(str(tmp_path))
    assert SvdLoraConfig.from_pretrained(str(tmp_path)).svd_factors == str(llama.file)


# Coverage and the base


def test_partial_coverage_starts_the_rest_as_stock_lora(llama, caplog, tmp_path):
    some = {name: layer for name, layer in llama.factors.items() if "layers.0" in name}
    file = write_factors(tmp_path / "some.safetensors", llama.base, some)
    with caplog.at_level("WARNING", logger="peft_svdinit.tuner"):
        model = llama.peft_model(svd_factors=str(file), svd_coverage="partial")
    assert "3 of 6 LoRA layers" in caplog.text
    expected = logits(tuned(llama.base, some))
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE


def test_partial_coverage_ignores_factors_without_target(llama):
    model = llama.peft_model(target_modules=["q_proj"], svd_coverage="partial")
    used = {name: layer for name, layer in llama.factors.items() if "q_proj" in name}
    expected = logits(tuned(llama.base, used))
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16, torch.bfloat16]])
def test_a_cast_copy_of_the_base_is_recognised_as_the_base(llama, dtypes):
    base = llama.model()
    for dtype in dtypes:
        base.to(dtype)
    get_peft_model(base, llama.config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_of_half_a_percent_of_one_layer_makes_another_base(tmp_path, architecture, dtype):
    scene = make_scene(tmp_path, architecture)
    edited, seeded = scene.model(), torch.Generator().manual_seed(0)
    name = list(scene.factors)[-1]
    weight = weight_of(edited, name)
    weight += 0.005 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=seeded)
    with pytest.raises(ValueError, match=f"the weights of layer {name} differ"):
        get_peft_model(edited.to(dtype), scene.config())


def test_another_base_of_the_same_shapes_is_refused_unless_told(llama):
    other = tiny_base("llama", seed=99)
    with pytest.raises(ValueError, match=r"another base model \(tiny-base\).*svd_check_base"):
        get_peft_model(other, llama.config())
    assert not has_lora_layers(other)
    model = get_peft_model(other, llama.config(svd_check_base=False))
    assert has_lora_layers(model)


def test_all_linear_targets_with_factors_of_all_linear_layers(tmp_path):
    base = tiny_base()
    factors = teacher_factors(base, "all-linear")
    file = write_factors(tmp_path / "all.safetensors", base, factors)
    expected = logits(tuned(base, factors))
    scene = Scene("llama", base, factors, file)
    model = scene.peft_model(target_modules="all-linear")
    assert largest_difference(logits(model), expected) < TEACHER_TOLERANCE
