"""LoRI inside PEFT: what trains, what is saved, and every operation on adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from support.lori_fixtures import (
    DENSITY,
    RANK,
    factors,
    lori_config,
    lori_model,
    off_mask,
    reloaded,
    same_bits,
    sparse_factors,
    trained_names,
)
from support.mixture import Mixture
from support.peft_fixtures import (
    adapted_layers,
    adapter_weights,
    equal_bits,
    has_lora_layers,
    logits,
    tiny_base,
    tokens,
    train,
)
from support.stock_process import LOGITS_OF_ADAPTERS, run_without_us
from support.tiny_models import ARCHITECTURES, TARGETS, rewrite_tensors, weight_of
from torch import Tensor, nn

from peft_svdinit import LoriConfig
from peft_svdinit.linalg import truncated_svd
from peft_svdinit.masks import random_projection
from peft_svdinit.models import linear_modules
from peft_svdinit.tuner.layers.sparse_factor import SparseFactor

STOCK: dict[str, Any] = {
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": TARGETS["llama"],
    "task_type": "CAUSAL_LM",
}


def trained(base: Any = None, **options: Any) -> Any:
    """A LoRI model after a few steps that move every output."""
    model = lori_model(base, **options)
    train(model, learning_rate=0.05)
    return model


def base_with(deltas: dict[str, Tensor], architecture: str = "llama") -> Any:
    """The tiny base with dense deltas (out, in) added."""
    base: Any = tiny_base(architecture)
    for name, delta in deltas.items():
        weight = weight_of(base, name)
        weight += delta.mT if linear_modules(base, [name])[name].transposed else delta
    return base


def products(model: Any, adapter_name: str = "default") -> dict[str, Tensor]:
    """scaling B A of every layer, in float64."""
    layers = adapted_layers(model, adapter_name)
    return {
        name: layers[name].scaling[adapter_name] * lora_B.double() @ lora_A.double()
        for name, (lora_A, lora_B) in factors(model, adapter_name).items()
    }


def half_base() -> Any:
    """The tiny base in bf16."""
    return nn.Module.to(tiny_base(), torch.bfloat16)


# What trains


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exactly_the_entries_of_the_mask_are_parameters(architecture):
    model: Any = get_peft_model(tiny_base(architecture), lori_config(architecture))
    layers = adapted_layers(model)
    size = sum(layer.out_features * RANK for layer in layers.values())
    kept = sum(len(factor.values) for factor in sparse_factors(model).values())
    assert kept == round(DENSITY * size)
    assert sum(model.get_parameter(name).numel() for name in trained_names(model)) == kept
    assert all(name.endswith("lora_B.default.values") for name in trained_names(model))
    assert len(trained_names(model)) == len(layers)
    mask = model.peft_config["default"].mask
    assert {name: layer.kept for name, layer in mask.layers.items()} == {
        name: len(factor.values) for name, factor in sparse_factors(model).items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_begins_at_the_base_and_training_moves_the_values_alone(architecture):
    model = get_peft_model(tiny_base(architecture), lori_config(architecture))
    assert torch.equal(logits(model), logits(tiny_base(architecture)))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses = train(model, learning_rate=0.05)
    assert losses[-1] < losses[0] or logits(model).isfinite().all()
    moved = [name for name, now in model.named_parameters() if not torch.equal(now, before[name])]
    assert moved == trained_names(model)
    for name, rest in off_mask(model).items():
        assert same_bits(rest, torch.zeros_like(rest)), name


@pytest.mark.parametrize("density", [DENSITY, 1.0])
def test_a_is_the_drawn_one_and_has_no_gradient(density):
    model = lori_model(lori_seed=4, lori_density=density)
    ids = tokens()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in adapted_layers(model).items():
        weight = layer.lora_A["default"].weight
        assert torch.equal(weight, random_projection(name, RANK, layer.in_features, 4))
        assert not weight.requires_grad and weight.grad is None
        trained_part = next(layer.lora_B["default"].parameters())
        assert trained_part.grad is not None and trained_part.grad.any()


def test_two_runs_are_equal_bit_for_bit_whatever_the_random_state():
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        torch.rand(state)
        runs.append(trained(lori_seed=7))
    assert equal_bits(runs[0].state_dict(), runs[1].state_dict())
    assert torch.equal(logits(runs[0]), logits(runs[1]))
    other = lori_model(lori_seed=8)
    assert not torch.equal(
        sparse_factors(other)["model.layers.0.self_attn.q_proj"].mask,
        sparse_factors(runs[0])["model.layers.0.self_attn.q_proj"].mask,
    )


def test_the_random_state_moves_no_further_than_with_stock_lora():
    """PEFT itself draws a start for every layer; ours draws nothing beyond that."""
    found = []
    for config in (LoraConfig(**STOCK), lori_config()):
        base = tiny_base()
        torch.manual_seed(5)
        get_peft_model(base, config)
        found.append(torch.rand(3))
    assert torch.equal(*found)


def test_calibration_trains_a_dense_b():
    model = trained(lori_density=1.0)
    for layer in adapted_layers(model).values():
        assert type(layer.lora_B["default"]) is torch.nn.Linear
        assert (layer.lora_B["default"].weight != 0).all()


@pytest.mark.parametrize(
    ("scope", "density"),
    [("type", 0.25), ("layer", 0.25), ("matrix", 0.3), ("row", 0.25), ("2:4", 0.5)],
)
def test_every_scope_of_a_random_mask_trains(scope, density):
    model = lori_model(lori_scope=scope, lori_density=density)
    before = logits(model)
    train(model, learning_rate=0.05)
    assert not torch.equal(logits(model), before)
    if scope in ("row", "2:4"):
        for factor in sparse_factors(model).values():
            assert (factor.mask.sum(1) == int(density * RANK)).all()


# Saved as stock LoRA


def case(architecture: str = "llama", route: str = "peft", **options: Any) -> tuple:
    return architecture, route, options


CASES = {
    "llama": case(),
    "gpt2": case("gpt2"),
    "all-linear": case(target_modules="all-linear"),
    "dense": case(lori_density=1.0),
    "rslora": case(use_rslora=True),
    "patterns": case(rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.mlp.down_proj": 7}),
    "dora": case(use_dora=True),
    "gpt2-dora": case("gpt2", use_dora=True),
    "head": case(modules_to_save=["lm_head"]),
    "bias": case("gpt2", bias="lora_only"),
    "transformers": case(route="transformers"),
}


@pytest.fixture(scope="module")
def here_and_elsewhere(tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits of every case here, and in a process that knows only stock PEFT."""
    folder = tmp_path_factory.mktemp("stock")
    here: dict[str, Tensor] = {}
    cases: dict[str, Any] = {"ids": str(folder / "ids.safetensors")}
    save_file({"ids": tokens()}, cases["ids"])
    for name, (architecture, route, options) in CASES.items():
        base = tiny_base(architecture)
        config = lori_config(architecture, **options)
        if route == "peft":
            model: Any = get_peft_model(base, config)
        else:
            model = base
            model.add_adapter(config)
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_B" in parameter_name)
        train(model, learning_rate=0.05)
        model.save_pretrained(str(folder / name))
        here[name] = logits(model)
        tiny_base(architecture).save_pretrained(str(folder / f"{architecture}-base"))
        cases[name] = {
            "base": str(folder / f"{architecture}-base"),
            "adapter": str(folder / name),
        }
    (folder / "cases.json").write_text(json.dumps(cases))
    run_without_us(folder, LOGITS_OF_ADAPTERS, "cases.json", "found.safetensors")
    return here, load_file(folder / "found.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_gives_the_same_logits(here_and_elsewhere, name):
    here, elsewhere = here_and_elsewhere
    assert (here[name] - logits(tiny_base(CASES[name][0]))).abs().max() > 1e-2
    assert torch.equal(elsewhere[name], here[name])
    assert (elsewhere[f"{name}.merged"] - here[name]).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_the_saved_tensors_are_those_of_a_stock_adapter(options):
    ours = get_peft_model_state_dict(lori_model(**options))
    stock = get_peft_model_state_dict(get_peft_model(tiny_base(), LoraConfig(**STOCK, **options)))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in stock.items()
    }


# Loaded again


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lori_density": 1.0}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_a_saved_adapter_goes_on_training_where_it_was(tmp_path, options, low_cpu_mem_usage):
    model = trained(**options)
    model.save_pretrained(str(tmp_path))
    again = reloaded(tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [name for name, weight in again.named_parameters() if weight.is_meta]
    assert trained_names(again) == trained_names(model)
    assert torch.equal(logits(again), logits(model))
    assert equal_bits(adapter_weights(again), adapter_weights(model))
    train(again)
    train(model)
    assert equal_bits(adapter_weights(again), adapter_weights(model))


def test_loaded_for_inference_nothing_trains(tmp_path):
    model = trained()
    model.save_pretrained(str(tmp_path))
    again = reloaded(tmp_path)
    assert trained_names(again) == []
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lori_density": 1.0}], ids=str)
def test_low_cpu_mem_usage_gives_the_same_new_adapter(options):
    low = get_peft_model(tiny_base(), lori_config(**options), low_cpu_mem_usage=True)
    assert not [name for name, weight in low.named_parameters() if weight.is_meta]
    expected = lori_model(**options)
    assert equal_bits(adapter_weights(low), adapter_weights(expected))
    assert torch.equal(logits(low), logits(expected))
    assert train(low, steps=1)[0] > 0


@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_over_a_half_precision_base(tmp_path, autocast, width):
    """`width` is what the adapter is loaded again in."""
    base = half_base()
    model = get_peft_model(copy.deepcopy(base), lori_config(), autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {weight.dtype for weight in adapter_weights(model).values()} == {wanted}
    for name, (lora_A, _) in factors(model).items():
        drawn = random_projection(name, lora_A.shape[0], lora_A.shape[1], 0)
        assert torch.equal(lora_A, drawn.to(wanted))
    train(model, learning_rate=0.05)
    model.save_pretrained(str(tmp_path))
    again = reloaded(
        tmp_path,
        copy.deepcopy(base),
        is_trainable=True,
        autocast_adapter_dtype=width == torch.float32,
    )
    for name, pair in factors(again).items():
        for found, saved in zip(pair, factors(model)[name], strict=True):
            assert found.dtype == width
            assert torch.equal(found, saved.to(width))
    # And once more: what it was rounded to stays recognised.
    again.save_pretrained(str(tmp_path / "again"))
    twice = reloaded(tmp_path / "again", copy.deepcopy(base), is_trainable=True)
    assert torch.equal(logits(twice), logits(again)) or width == torch.bfloat16
    train(twice)


def test_under_autocast_it_trains_and_keeps_its_entries():
    model = lori_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train(model, learning_rate=0.05)
    assert torch.tensor(losses).isfinite().all()
    assert all(not rest.any() for rest in off_mask(model).values())
    assert all(factor.values.any() for factor in sparse_factors(model).values())


@pytest.mark.parametrize("density", [DENSITY, 1.0])
def test_weights_of_another_seed_are_refused_by_layer(tmp_path, density):
    trained(lori_density=density).save_pretrained(str(tmp_path))
    config = lori_config(lori_seed=5, lori_density=density)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0.*another A.*lori_seed"):
        PeftModel.from_pretrained(tiny_base(), str(tmp_path), config=config)


def test_weights_of_another_mask_are_refused_by_layer(tmp_path):
    trained(lori_density=0.5).save_pretrained(str(tmp_path))
    names = r"layer model\.layers\.0.*other entries off the mask.*lori_mask and lori_start"
    with pytest.raises(ValueError, match=names):
        PeftModel.from_pretrained(tiny_base(), str(tmp_path), config=lori_config())


def test_an_entry_off_the_mask_in_the_file_is_refused(tmp_path):
    model = trained()
    model.save_pretrained(str(tmp_path))
    name = "model.layers.1.mlp.down_proj"
    row, column = (~sparse_factors(model)[name].mask).nonzero()[0].tolist()

    def spoil(tensors):
        tensors[f"base_model.model.{name}.lora_B.weight"][row, column] = 1e-30

    rewrite_tensors(tmp_path / "adapter_model.safetensors", spoil)
    with pytest.raises(ValueError, match=rf"layer {name}: lora_B has 1 other entries"):
        reloaded(tmp_path)


@pytest.mark.parametrize("density", [DENSITY, 1.0])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_file_that_lacks_a_factor_is_refused_by_layer(tmp_path, part, density):
    """PEFT warns and leaves the layer as it is made, B at zero."""
    trained(lori_density=density).save_pretrained(str(tmp_path))
    name = "model.layers.1.mlp.down_proj"
    rewrite_tensors(
        tmp_path / "adapter_model.safetensors",
        lambda tensors: tensors.pop(f"base_model.model.{name}.{part}.weight"),  # pyright: ignore
    )
    with pytest.raises(ValueError, match=rf"layer {name}: the saved adapter has no {part}"):
        reloaded(tmp_path)


def test_a_factor_of_another_shape_in_the_file_is_refused_by_layer(tmp_path):
    trained().save_pretrained(str(tmp_path))
    name = "model.layers.1.mlp.down_proj"

    def shorten(tensors):
        key = f"base_model.model.{name}.lora_B.weight"
        tensors[key] = tensors[key][:-1].clone()

    rewrite_tensors(tmp_path / "adapter_model.safetensors", shorten)
    with pytest.raises(ValueError, match=rf"layer {name}: lora_B is of shape \(15, 8\)"):
        reloaded(tmp_path)


def test_the_state_dict_of_a_model_with_another_mask_is_refused_by_layer():
    """The number of values of a mask with a budget for each matrix is that of any other."""
    source = trained(lori_scope="matrix")
    target = lori_model(lori_scope="matrix")
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target), logits(source))
    other = lori_model(lori_scope="matrix", lori_seed=1)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.default.*lori"):
        other.load_state_dict(source.state_dict())


# Starting from another adapter


def test_a_start_begins_at_the_adapter_and_keeps_what_is_off_the_mask(tmp_path):
    first = trained(lori_density=1.0)
    first.save_pretrained(str(tmp_path / "first"))
    model = lori_model(lori_start=tmp_path / "first")
    assert torch.equal(logits(model), logits(first))
    initial = off_mask(model)
    assert all(rest.any() for rest in initial.values())
    train(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5))
    assert not torch.equal(logits(model), logits(first))
    assert all(same_bits(rest, initial[name]) for name, rest in off_mask(model).items())
    model.save_pretrained(str(tmp_path / "second"))
    again = reloaded(tmp_path / "second", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert all(same_bits(rest, initial[name]) for name, rest in off_mask(again).items())
    stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "second"))
    assert torch.equal(logits(stock), logits(model))


def test_a_start_over_a_half_precision_base_is_recognised_when_loaded(tmp_path):
    trained(lori_density=1.0).save_pretrained(str(tmp_path / "first"))
    base = half_base()
    model = lori_model(copy.deepcopy(base), lori_start=tmp_path / "first")
    train(model)
    model.save_pretrained(str(tmp_path / "second"))
    for autocast in (True, False):
        again = reloaded(tmp_path / "second", copy.deepcopy(base), autocast_adapter_dtype=autocast)
        assert (logits(again) - logits(model)).abs().max() < 0.1


def test_a_calibration_can_go_on_from_an_adapter(tmp_path):
    first = trained()
    first.save_pretrained(str(tmp_path))
    model = lori_model(lori_density=1.0, lori_start=tmp_path)
    assert torch.equal(logits(model), logits(first))
    train(model)
    assert all((lora_B != 0).all() for _, lora_B in factors(model).values())


# Operations on adapters


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_unmerging_and_disabling(architecture, safe_merge, options):
    model = get_peft_model(tiny_base(architecture), lori_config(architecture, **options))
    train(model, learning_rate=0.05)
    expected, base = logits(model), logits(tiny_base(architecture))
    assert (expected - base).abs().max() > 1e-2
    model.merge_adapter(safe_merge=safe_merge)
    assert (logits(model) - expected).abs().max() < 1e-4
    model.unmerge_adapter()
    assert (logits(model) - expected).abs().max() < 1e-4
    with model.disable_adapter():
        assert (logits(model) - base).abs().max() < 1e-4
    train(model, steps=1)
    expected = logits(model)
    assert (logits(model.merge_and_unload(safe_merge=safe_merge)) - expected).abs().max() < 1e-4


def test_disabling_and_unloading_give_the_base_exactly():
    model = trained()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_base()))
    assert torch.equal(logits(model.unload()), logits(tiny_base()))


def three_adapters() -> tuple[Any, dict[str, Tensor]]:
    """Two LoRI adapters and a stock LoRA, trained one after the other, and the logits of each."""
    model = lori_model()
    model.add_adapter("other", lori_config(lori_seed=1, lori_density=0.5))
    model.add_adapter("stock", LoraConfig(**STOCK))
    found = {}
    for name in ("default", "other", "stock"):
        model.set_adapter(name)
        train(model, learning_rate=0.05)
        found[name] = logits(model)
    return model, found


def test_switching_between_adapters_trains_the_active_one_alone():
    model, found = three_adapters()
    base = logits(tiny_base())
    for name in ("stock", "default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), found[name])
        assert (found[name] - base).abs().max() > 1e-2
        parts = {part.rsplit(f".{name}", 1)[0].rsplit(".", 1)[1] for part in trained_names(model)}
        assert parts == ({"lora_A", "lora_B"} if name == "stock" else {"lora_B"})
        assert all(f".{name}" in part for part in trained_names(model))
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert not [name for name in trained_names(model) if "lora_A" in name]


def test_an_inactive_second_adapter_does_not_train():
    model = lori_model()
    model.add_adapter("second", lori_config(lori_seed=1), low_cpu_mem_usage=True)
    assert not [name for name in trained_names(model) if ".second" in name]
    before = adapter_weights(model, "second")
    train(model)
    assert equal_bits(adapter_weights(model, "second"), before)
    assert not [name for name, weight in model.named_parameters() if weight.is_meta]


def test_each_batch_row_can_have_its_own_adapter():
    model, _ = three_adapters()
    ids = tokens(batch=4)
    names = ["default", "other", "stock", "__base__"]
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        assert (found[row] - logits(model, ids)[row]).abs().max() < 1e-5
    assert (found[3] - logits(tiny_base(), ids)[3]).abs().max() < 1e-5


def test_two_active_adapters_add_up():
    model, _ = three_adapters()
    model.base_model.set_adapter(["default", "other"])
    deltas = products(model)
    for name, delta in products(model, "other").items():
        deltas[name] = deltas[name] + delta
    found = logits(model)
    assert (found - logits(base_with({n: d.float() for n, d in deltas.items()}))).abs().max() < 1e-4


def test_adapters_can_be_saved_one_by_one(tmp_path):
    model, found = three_adapters()
    model.save_pretrained(str(tmp_path))
    model.set_adapter("other")
    assert torch.equal(logits(reloaded(tmp_path / "other")), found["other"])
    assert torch.equal(logits(reloaded(tmp_path)), found["default"])
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)


def test_a_deleted_adapter_leaves_nothing_behind():
    model, found = three_adapters()
    model.delete_adapter("other")
    assert not [name for name in model.state_dict() if ".other" in name]
    model.set_adapter("default")
    assert torch.equal(logits(model), found["default"])
    # The name is free again, also for an adapter whose A trains.
    model.add_adapter("other", LoraConfig(**STOCK))
    model.set_adapter("other")
    assert [name for name in trained_names(model) if "lora_A" in name]
    assert torch.equal(logits(model), logits(tiny_base()))


@pytest.mark.parametrize("first", ["default", "stock"])
@pytest.mark.parametrize("combination", ["cat", "linear", "svd", "ties", "dare_linear", "ties_svd"])
def test_weighted_adapters_are_the_combination_of_the_dense_ones(combination, first):
    """With the sparse B once read as parameters, the result was zero, without a word."""
    model, _ = three_adapters()
    names = [first, *({"default", "other", "stock"} - {first})]
    weights = [0.7, -0.3, 0.5]
    if combination != "cat" and combination != "linear":
        weights[1] = 0.3
    options: dict[str, Any] = {"combination_type": combination}
    if "ties" in combination or "dare" in combination:
        options["density"] = 1.0
    model.add_weighted_adapter(names, weights, "all", **options)
    config = model.peft_config["all"]
    assert type(config) is LoraConfig and config.init_lora_weights is True
    assert type(model.peft_config["default"]) is LoriConfig
    found = products(model, "all")
    each = {name: factors(model, name) for name in names}
    deltas = {name: products(model, name) for name in names}
    assert all(delta.abs().max() > 1e-3 for delta in found.values())
    for layer, delta in found.items():
        if combination in ("cat", "svd"):
            expected = sum(
                weight * deltas[name][layer] for name, weight in zip(names, weights, strict=True)
            )
            if combination == "svd":
                U, S, Vh = truncated_svd(torch.as_tensor(expected), RANK)
                expected = (U * S) @ Vh
        elif combination in ("linear", "dare_linear"):
            sum_A = sum(
                abs(2 * w) ** 0.5 * (1 if w > 0 else -1) * each[name][layer][0].double()
                for name, w in zip(names, weights, strict=True)
            )
            sum_B = sum(
                abs(2 * w) ** 0.5 * each[name][layer][1].double()
                for name, w in zip(names, weights, strict=True)
            )
            expected = torch.as_tensor(sum_B) @ torch.as_tensor(sum_A)
        else:
            continue
        assert (delta - expected).abs().max() < 1e-5
    model.set_adapter("all")
    assert (logits(model) - logits(tiny_base())).abs().max() > 1e-2
    dense = base_with({name: delta.float() for name, delta in found.items()})
    assert (logits(model) - logits(dense)).abs().max() < 1e-4


def test_a_weighted_adapter_is_saved_as_stock_and_the_first_ones_mask_stays_its_own(tmp_path):
    model, found = three_adapters()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "both" / "lori_mask.safetensors").exists()
    model.set_adapter("both")
    stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "both"))
    assert (logits(stock) - logits(model)).abs().max() < 1e-5
    assert torch.equal(logits(reloaded(tmp_path)), found["default"])


# Layers


@pytest.mark.parametrize(("name", "kind"), [("embedding", "Embedding"), ("convolution", "Conv1d")])
def test_a_layer_that_is_not_linear_is_refused_by_name(name, kind):
    base = Mixture()
    config = LoriConfig(r=4, target_modules=["linear", name], lori_density=0.5)
    with pytest.raises(TypeError, match=rf"layer {name} is a {kind}.*target_modules"):
        get_peft_model(base, config)
    assert not has_lora_layers(base)
    assert all(weight.requires_grad for weight in base.parameters())


def test_a_fused_attention_is_adapted_as_stock_lora_would(tmp_path):
    torch.manual_seed(0)
    base = Mixture()
    config = LoriConfig(r=4, target_modules=["linear", "attention"], lori_density=0.5)
    model = get_peft_model(copy.deepcopy(base), config)
    ids = torch.arange(6).reshape(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(ids).detach()
    model(ids).square().sum().backward()
    optimizer.step()
    assert all(factor.values.any() for factor in sparse_factors(model).values())
    model.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    now = model.eval()(ids)
    assert (stock(ids) - now).abs().max() < 1e-6
    assert (now - before).abs().max() > 1e-3


def test_an_a_that_a_sharded_save_leaves_out_is_drawn_again():
    """Under ZeRO-3 the Trainer gathers only what is trained."""
    for options in ({}, {"lori_density": 1.0}, {"use_dora": True}):
        model = trained(**options)
        expected = get_peft_model_state_dict(model)
        given = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        found = get_peft_model_state_dict(model, state_dict=given)
        assert equal_bits(dict(found), dict(expected))


def test_in_a_sharded_save_the_other_processes_are_given_nothing():
    assert get_peft_model_state_dict(lori_model(), state_dict={}) == {}


# transformers' own adapters


@pytest.mark.parametrize("density", [DENSITY, 1.0])
def test_add_adapter_of_transformers_saves_and_reloads(tmp_path, density):
    model: Any = tiny_base()
    model.add_adapter(lori_config(lori_density=density))
    expected = lori_model(lori_density=density)
    assert not [name for name in trained_names(model) if "lora_A" in name]
    for options in (model, expected):
        parameters = [w for name, w in options.named_parameters() if "lora_B" in name]
        train(options, optimizer=torch.optim.AdamW(parameters, lr=0.05))
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(str(tmp_path))
    assert LoriConfig.from_pretrained(str(tmp_path)).lori_density == density
    other: Any = tiny_base()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), logits(model))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_base()))


def test_a_loader_that_does_not_find_the_values_is_no_silent_zero_adapter(tmp_path):
    """transformers looks for names of its own; with the stock configuration it finds them."""
    trained().save_pretrained(str(tmp_path))
    model: Any = tiny_base()
    model.load_adapter(str(tmp_path), peft_config=LoriConfig.from_pretrained(str(tmp_path)))
    names = r"layer model\.layers\.0\.self_attn\.q_proj: the saved weights.*never loaded"
    with pytest.raises(RuntimeError, match=names):
        logits(model)
    with pytest.raises(RuntimeError, match="never loaded"):
        get_peft_model(tiny_base(), LoriConfig.from_pretrained(str(tmp_path))).merge_adapter()


def test_a_saved_configuration_can_be_trained_anew(tmp_path):
    trained().save_pretrained(str(tmp_path))
    config = LoriConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    model = get_peft_model(tiny_base(), config)
    assert torch.equal(logits(model), logits(tiny_base()))
    train(model)


def test_a_lori_adapter_beside_a_stock_one_that_transformers_loads(tmp_path):
    get_peft_model(tiny_base(), LoraConfig(**STOCK)).save_pretrained(str(tmp_path))
    model: Any = tiny_base()
    model.add_adapter(lori_config(), adapter_name="sparse")
    train(model)
    expected = logits(model)
    model.load_adapter(str(tmp_path), adapter_name="stock")
    model.set_adapter("stock")
    assert torch.equal(logits(model), logits(tiny_base()))
    model.set_adapter("sparse")
    assert torch.equal(logits(model), expected)


def test_injection_in_place_starts_too():
    model = inject_adapter_in_model(lori_config(), tiny_base())
    assert all(isinstance(f, SparseFactor) for f in sparse_factors(model).values())
    assert torch.equal(logits(model), logits(tiny_base()))


def test_gradient_checkpointing_of_the_model_changes_no_bit():
    models = []
    for reentrant in (None, False, True):
        model = lori_model()
        if reentrant is not None:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train(model, learning_rate=0.05)
        models.append(model)
    for model in models[1:]:
        assert equal_bits(adapter_weights(model), adapter_weights(models[0]))


def test_a_folder_elsewhere_is_what_it_was(tmp_path):
    """A saved adapter is whole in itself: it can be moved."""
    model = trained(lori_density=0.5)
    model.save_pretrained(str(tmp_path / "here"))
    Path(tmp_path / "here").rename(tmp_path / "there")
    assert torch.equal(logits(reloaded(tmp_path / "there")), logits(model))
