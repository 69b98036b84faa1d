"""Starts from the base weights themselves: exact triplets, untouched weights, stock adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import assume, given
from peft import LoraConfig, PeftModel, get_peft_model
from support.peft_fixtures import (
    adapted_layers,
    adapter_weights,
    equal_bits,
    logits,
    tiny_base,
    train,
)
from support.quantised import quantised
from support.reference import array, principal_cosines, singular_values, tolerance, truncated
from support.strategies import matrices_with_rank
from support.tiny_models import TARGETS, VOCABULARY, weight_of
from torch import nn
from torch.testing import assert_close

from peft_svdinit import SvdLoraConfig, initialize_lora_from_factors, weight_factors
from peft_svdinit.factors.sources import weight as weight_source
from peft_svdinit.factors.sources.minor_part import minor_factors
from peft_svdinit.factors.sources.weight import part_of_weight
from peft_svdinit.tuner.model import SvdLoraModel

PARTS = ("principal", "minor")


def config(architecture: str = "llama", **options) -> SvdLoraConfig:
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[architecture],
        "svd_source": "weight",
        "svd_start": "reference",
        "svd_split": "balanced",
        "task_type": "CAUSAL_LM",
    }
    return SvdLoraConfig(**{**defaults, **options})


def oriented(model: nn.Module, name: str, architecture: str) -> torch.Tensor:
    weight = weight_of(model, name)
    return weight.mT if architecture == "gpt2" else weight


def cut_is_clear(matrix: torch.Tensor, rank: int) -> bool:
    """Whether the leading `rank` triplets are told from the others by a gap."""
    values = singular_values(matrix)
    return rank in (0, len(values)) or values[rank - 1] - values[rank] > 1e-3 * values[0]


@given(case=matrices_with_rank())
def test_the_minor_part_has_the_last_singular_values_and_orthonormal_vectors(case):
    matrix, rank = case
    found = minor_factors(matrix, rank)
    bound = tolerance(matrix)["atol"]
    expected = singular_values(matrix)[len(singular_values(matrix)) - rank :]
    assert abs(array(found.S) - expected).max() <= bound
    assert abs(array(found.U).T @ array(found.U) - torch.eye(rank).numpy()).max() < 1e-5
    assert abs(array(found.Vh) @ array(found.Vh).T - torch.eye(rank).numpy()).max() < 1e-5
    assert (found.S.diff() <= 0).all()


@given(case=matrices_with_rank())
def test_principal_and_minor_part_make_up_the_whole(case):
    matrix, rank = case
    rest = min(matrix.shape) - rank
    assume(cut_is_clear(matrix, rank))
    whole = array(part_of_weight(matrix, rank).dense())
    if rest:
        whole = whole + array(minor_factors(matrix, rest).dense())
    assert abs(whole - array(matrix)).max() <= 1e3 * tolerance(matrix)["atol"]


@given(case=matrices_with_rank())
def test_the_minor_part_of_the_transpose_is_the_transpose(case):
    matrix, rank = case
    found, flipped = minor_factors(matrix, rank), minor_factors(matrix.mT, rank)
    assume(cut_is_clear(matrix, min(matrix.shape) - rank))
    bound = 1e3 * tolerance(matrix)["atol"]  # the gap amplifies rounding
    assert abs(array(found.dense()) - array(flipped.dense().mT)).max() <= bound


def test_a_large_weight_with_a_flat_spectrum_keeps_all_but_a_percent_of_the_best_energy():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 300, generator=generator)
    found = part_of_weight(weight, 8)
    best = (singular_values(weight)[:8] ** 2).sum()
    assert 0.99 < float(found.S.double().square().sum()) / best < 1 + 1e-5
    assert found.norm == pytest.approx(weight.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank must be in \[1, 4\].*\(4, 9\)"):
        minor_factors(torch.ones(4, 9), rank)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="svd_part must be one of principal, minor, got 'middle'"):
        part_of_weight(torch.ones(4, 4), 2, "middle")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("part", PARTS)
def test_a_reference_start_changes_neither_the_function_nor_the_base(architecture, part):
    base = tiny_base(architecture)
    before = copy.deepcopy(base.state_dict())
    expected = logits(base)
    model = get_peft_model(base, config(architecture, svd_part=part))
    assert_close(logits(model), expected, rtol=0, atol=1e-5)
    for name, layer in adapted_layers(model).items():
        weight = layer.get_base_layer().weight
        assert torch.equal(weight, before[f"{name}.weight"])
        # The adapter's product is the chosen part of the weight.
        matrix = weight.mT if architecture == "gpt2" else weight
        product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        chosen = slice(0, 4) if part == "principal" else slice(len(S) - 4, len(S))
        dense = (U[:, chosen] * S[chosen]) @ Vh[chosen]
        assert_close(product.double(), dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_the_config_and_the_function_give_the_same_start(part):
    base = tiny_base()
    factors = weight_factors(base, rank=4, part=part, target_modules=TARGETS["llama"])
    stock = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    posthoc = get_peft_model(copy.deepcopy(base), stock)
    initialize_lora_from_factors(posthoc, factors, start="reference", split="balanced")
    model = get_peft_model(base, config(svd_part=part))
    assert equal_bits(adapter_weights(posthoc), adapter_weights(model))


def test_a_subspace_start_takes_directions_and_no_product():
    model = get_peft_model(tiny_base(), config(svd_start="subspace"))
    for layer in adapted_layers(model).values():
        best = truncated(layer.get_base_layer().weight, 4)
        directions = torch.linalg.svd(torch.from_numpy(best), full_matrices=False).Vh[:4]
        found = layer.lora_A["default"].weight.double()
        assert principal_cosines(found.mT, directions.mT).min() > 1 - 1e-6
        assert not layer.lora_B["default"].weight.any()


def test_ranks_of_a_pattern_are_kept():
    model = get_peft_model(
        tiny_base(), config(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    )
    for name, layer in adapted_layers(model).items():
        assert layer.lora_A["default"].weight.shape[0] == (2 if "q_proj" in name else 4)


@pytest.mark.parametrize("part", PARTS)
def test_it_trains_is_saved_as_stock_and_restored_from_the_sidecar(part, tmp_path):
    base = tiny_base()
    model = get_peft_model(copy.deepcopy(base), config(svd_part=part))
    train(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 8 and not [key for key in saved if key.startswith("svd_")]
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert_close(logits(stock), expected, rtol=0, atol=1e-5)
    restored = SvdLoraConfig.from_pretrained(str(tmp_path))
    assert (restored.svd_source, restored.svd_part) == ("weight", part)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), config=restored)
    assert torch.equal(logits(resumed), expected)


def test_a_resumed_reference_is_the_saved_one_and_not_a_recomputed_one(tmp_path, monkeypatch):
    """On another machine, an SVD of the same weight gives other vectors by rounding."""
    base = tiny_base()
    model = get_peft_model(copy.deepcopy(base), config())
    train(model)
    model.save_pretrained(str(tmp_path))
    original = weight_source.part_of_weight

    def rounded_otherwise(weight, rank, part):
        found = original(weight, rank, part)
        turn = torch.linalg.qr(torch.eye(rank) + 0.01 * torch.ones(rank, rank).triu()).Q
        return type(found)(found.U @ turn, found.S, turn.mT @ found.Vh, found.norm)

    monkeypatch.setattr(weight_source, "part_of_weight", rounded_otherwise)
    restored = SvdLoraConfig.from_pretrained(str(tmp_path))
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), config=restored)
    assert torch.equal(logits(resumed), logits(model))


def test_a_half_precision_base_costs_one_svd_per_layer_and_keeps_float32_factors(monkeypatch):
    base = tiny_base().to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    calls = []
    original = weight_source.part_of_weight
    monkeypatch.setattr(
        weight_source, "part_of_weight", lambda *args: calls.append(1) or original(*args)
    )
    model = get_peft_model(base, config())
    layers = adapted_layers(model)
    assert len(calls) == len(layers)
    for layer in layers.values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.dtype == torch.float32
        best = truncated(layer.get_base_layer().weight.float(), 4)
        assert abs(array(2 * B @ A) - best).max() < 1e-5


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_weight_is_factorised_as_it_acts(kind):
    pytest.importorskip("bitsandbytes")
    try:
        base = quantised(tiny_base(), kind)
        expected = logits(base)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no {kind} on this CPU: {error}")
    model = get_peft_model(base, config())
    assert_close(logits(model), expected, rtol=0, atol=1e-5)
    for layer in adapted_layers(model).values():
        eye = torch.eye(layer.in_features)
        acted = layer.get_base_layer()(eye).detach().mT
        product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        # An 8-bit layer also rounds its input.
        atol = 1e-4 if kind == "4bit" else 2e-2
        assert abs(array(product) - truncated(acted, 4)).max() < atol


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd_start": "delta"}, 'svd_start="delta" would add a part of each weight to the weight'),
        ({"svd_factors": "x"}, "svd_factors='x' is not read with svd_source=\"weight\""),
        ({"svd_part": "middle"}, "svd_part must be one of principal, minor, got 'middle'"),
        ({"svd_source": "noise"}, "svd_source must be .*got 'noise'"),
        ({"svd_source": "gradient"}, "gradient_factors.*initialize_lora_from_factors"),
        ({"svd_source": "activation"}, "activation_factors.*initialize_lora_from_factors"),
        ({"svd_source": "teacher"}, "svd_factors must name"),
        ({"svd_source": "teacher", "svd_factors": "x", "svd_part": "minor"}, "svd_part='minor'"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_an_impossible_combination_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_rank_above_a_layers_is_refused_and_the_model_left_as_it_was():
    base = tiny_base()
    with pytest.raises(ValueError, match=r"v_proj: r=9 is above the 8 triplets"):
        get_peft_model(base, config(r=9))
    assert not any("lora_" in name for name, _ in base.named_modules())


def test_a_layer_that_is_no_matrix_is_refused_by_name():
    with pytest.raises(TypeError, match=r"embed_tokens is a .*only linear layers"):
        get_peft_model(tiny_base(), config(target_modules=["embed_tokens"]))


def test_a_merged_adapter_is_not_taken_for_the_base():
    model = get_peft_model(tiny_base(), config(svd_start="subspace"))
    train(model, learning_rate=0.1)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", config())
    fresh = get_peft_model(tiny_base(), config())
    for name, layer in adapted_layers(model, "second").items():
        found, expected = (
            each.lora_B[key].weight @ each.lora_A[key].weight
            for each, key in ((layer, "second"), (adapted_layers(fresh)[name], "default"))
        )
        assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_that_carries_an_adapter_has_no_base_weights_to_offer():
    model = get_peft_model(tiny_base(), config())
    assert isinstance(model.base_model, SvdLoraModel)
    with pytest.raises(ValueError, match=r"carries an adapter.*before get_peft_model"):
        weight_factors(model, rank=2)


def test_a_weight_on_the_meta_device_is_refused_by_name():
    with torch.device("meta"):
        base = tiny_base()
    with pytest.raises(RuntimeError, match=r"q_proj.*meta device"):
        weight_factors(base, rank=2, target_modules=["q_proj"])


def test_a_weight_in_an_unreadable_type_is_refused_by_name():
    base = tiny_base()
    name = "model.layers.0.self_attn.q_proj"
    weight = weight_of(base, name).to(torch.float8_e4m3fn)
    base.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match=r"layers.0.self_attn.q_proj.*float8.*16 or 32 bits"):
        weight_factors(base, rank=2, target_modules=["q_proj"])


def test_the_vocabulary_of_the_tiny_model_is_no_target():
    names = weight_factors(tiny_base(), rank=2)
    assert not [name for name in names if "lm_head" in name or "embed" in name]
    assert all(VOCABULARY not in layer.shape for layer in names.values())


def test_an_adapter_made_on_the_meta_device_starts_like_any_other():
    base = tiny_base()
    model = get_peft_model(copy.deepcopy(base), config(), low_cpu_mem_usage=True)
    expected = get_peft_model(base, config())
    assert equal_bits(adapter_weights(model), adapter_weights(expected))


def test_a_second_adapter_starts_from_the_base_and_not_from_the_first():
    model = get_peft_model(tiny_base(), config())
    train(model, learning_rate=0.1)
    model.add_adapter("second", config(svd_part="minor"))
    model.set_adapter("second")
    assert_close(logits(model), logits(tiny_base()), rtol=0, atol=1e-5)
