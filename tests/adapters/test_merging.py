"""Merged adapters: exact where they say so, PEFT's own where they go through it, never silent."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.adapter_files import kohya_lora, lycoris_peft, peft_deltas
from support.peft_fixtures import equal_bits, logits, tokens
from support.reference import array, discarded, frobenius, lora_delta, lora_scaling
from support.stock_process import LOGITS_OF_ADAPTERS, run_without_us
from support.strategies import Product, products, seeds
from support.tiny_models import rewrite_tensors, tiny_model, trained_adapter, truncate, weight_of
from torch import Tensor

from peft_svdinit.adapters import MergeMethod, merge, resize
from peft_svdinit.adapters.merging.exact import concatenated, on_shared_A
from peft_svdinit.adapters.merging.methods import METHODS
from peft_svdinit.adapters.merging.record import Merged
from peft_svdinit.adapters.merging.terms import coefficient, distance_from_sum, norm_of_sum
from peft_svdinit.adapters.weighted_sum import Term
from peft_svdinit.factors import LoraProduct, RankRule

WEIGHTS = "adapter_model.safetensors"
# One of every family, with all that it needs.
EXACT = MergeMethod("cat")
PEFTS = [
    MergeMethod("linear"),
    MergeMethod("ties", density=0.6),
    MergeMethod("ties", density=0.6, majority_sign_method="frequency"),
    MergeMethod("magnitude_prune", density=0.6),
    MergeMethod("dare_linear", density=1.0),
    MergeMethod("dare_ties", density=1.0),
    MergeMethod("ties_svd", rank=5, density=0.6),
    MergeMethod("magnitude_prune_svd", rank=5, density=0.6),
    MergeMethod("dare_linear_svd", rank=5, density=1.0),
    MergeMethod("dare_ties_svd", rank=5, density=1.0),
]
ALL = [EXACT, MergeMethod("svd", rank=3), *PEFTS, MergeMethod("dare_linear", density=0.5)]


def title(method: MergeMethod) -> str:
    return "-".join(str(value) for value in vars(method).values() if value is not None)


def deltas(folder: Path, architecture: Any = "llama") -> dict[str, Tensor]:
    """What stock PEFT adds to every layer, in float64."""
    return peft_deltas(PeftModel.from_pretrained(tiny_model(architecture), str(folder)))


def exact_sum(
    folders: Sequence[Path], weights: Sequence[float], architecture: Any = "llama"
) -> dict[str, Tensor]:
    """Σ weight * delta, dense."""
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder, architecture).items():
            total[name] = total.get(name, torch.zeros(())) + weight * delta
    return total


def three(folder: Path, architecture: Any = "llama", **options: Any) -> list[Path]:
    """Adapters whose scalings differ: plain, rslora and an alpha of its own for some layers."""
    paths = [folder / name for name in "abc"]
    trained_adapter(paths[0], architecture, seed=1, **options)
    trained_adapter(paths[1], architecture, seed=2, use_rslora=True, **options)
    trained_adapter(paths[2], architecture, seed=3, alpha_pattern={"q_proj": 40}, **options)
    return paths


def share_A(paths: Sequence[Path]) -> None:
    """Give all adapters the lora_A of the first."""
    first = load_file(paths[0] / WEIGHTS)
    for path in paths[1:]:
        rewrite_tensors(
            path / WEIGHTS,
            lambda tensors: tensors.update({k: v for k, v in first.items() if "lora_A" in k}),
        )


def assert_reported(merged: Merged, total: Mapping[str, Tensor], found: Mapping[str, Tensor]):
    """The errors are those of the dense deltas."""
    assert total.keys() == found.keys() == {layer.name for layer in merged.layers}
    lost = size = 0.0
    for layer in merged.layers:
        norm, error = frobenius(total[layer.name]), frobenius(total[layer.name] - found[layer.name])
        assert layer.norm == pytest.approx(norm, rel=1e-6)
        assert layer.error == pytest.approx(error, rel=1e-5, abs=1e-12 * norm)
        assert layer.relative_error == pytest.approx(error / norm, rel=1e-5, abs=1e-12)
        lost, size = lost + error**2, size + norm**2
    assert merged.relative_error == pytest.approx(math.sqrt(lost / size), rel=1e-5, abs=1e-12)


# Exact sums


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_concatenation_is_the_exact_sum(tmp_path, architecture):
    options = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    paths, weights = three(tmp_path, architecture, **options), [0.4, -1.3, 0.7]
    merged = merge(paths, tmp_path / "m", EXACT, weights=weights)
    total, found = exact_sum(paths, weights, architecture), deltas(tmp_path / "m", architecture)
    for name, delta in found.items():
        torch.testing.assert_close(delta, total[name], rtol=1e-5, atol=1e-7)
    assert_reported(merged, total, found)
    assert merged.relative_error < 1e-7
    assert {layer.rank for layer in merged.layers} == {12}
    assert merged.parameters == merged.parameters_before


def test_ranks_add_up_where_layers_differ_and_some_adapters_lack_them(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    trained_adapter(a, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9})
    trained_adapter(b, seed=2, r=5, use_rslora=True, target_modules=["q_proj", "o_proj"])
    merged = merge([a, b], tmp_path / "m", weights=[0.5, 2.0])
    total, found = exact_sum([a, b], [0.5, 2.0]), deltas(tmp_path / "m")
    assert_reported(merged, total, found)
    ranks = {layer.name.rpartition(".")[2]: layer.rank for layer in merged.layers}
    assert ranks == {"q_proj": 7, "v_proj": 4, "down_proj": 4, "o_proj": 5}
    assert set(merged.only_in_some) == {name for name in total if "q_proj" not in name}
    (pair,) = merged.pairs
    assert pair.interference.layers == 2


def test_stock_peft_adds_the_sum_in_a_process_without_us(tmp_path):
    paths = three(tmp_path)
    trained_adapter(paths[2], seed=3, target_modules=["q_proj"], r=7)  # a rank pattern
    base, weights = tiny_model(), [0.4, 0.4, -0.6]
    base.save_pretrained(str(tmp_path / "base"))
    tuned = tiny_model()
    for name, delta in exact_sum(paths, weights).items():
        weight_of(tuned, name).add_(delta.float())
    cases: dict[str, Any] = {"ids": str(tmp_path / "ids")}
    save_file({"ids": tokens()}, tmp_path / "ids")
    merge(paths, tmp_path / "cat", EXACT, weights=weights)
    merge(paths, tmp_path / "svd", MergeMethod("svd", rank=16), weights=weights)
    for name in ("cat", "svd"):
        cases[name] = {"base": str(tmp_path / "base"), "adapter": str(tmp_path / name)}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_without_us(tmp_path, LOGITS_OF_ADAPTERS, "cases.json", "logits")
    expected = logits(tuned)
    assert float((expected - logits(base)).abs().max()) > 0.1
    for name, found in load_file(tmp_path / "logits").items():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_a_shared_A_keeps_the_rank_and_gives_the_sum_of_the_concatenation(tmp_path):
    paths, weights = three(tmp_path), [0.4, 0.9, -0.2]
    share_A(paths)
    merged = merge(paths, tmp_path / "m", MergeMethod("shared"), weights=weights)
    stacked = merge(paths, tmp_path / "cat", EXACT, weights=weights)
    assert {layer.rank for layer in merged.layers} == {4}
    assert merged.shares_A and stacked.shares_A
    found, other = deltas(tmp_path / "m"), deltas(tmp_path / "cat")
    assert_reported(merged, exact_sum(paths, weights), found)
    for name, delta in found.items():
        torch.testing.assert_close(delta, other[name], rtol=1e-5, atol=1e-7)
    stored, first = load_file(tmp_path / "m" / WEIGHTS), load_file(paths[0] / WEIGHTS)
    assert all(torch.equal(stored[key], first[key]) for key in first if "lora_A" in key)


@pytest.mark.parametrize("change", ["bit", "rank"])
def test_an_A_that_differs_by_a_bit_is_refused_by_layer(tmp_path, change):
    paths = three(tmp_path)
    share_A(paths)
    if change == "rank":
        trained_adapter(paths[1], r=3)
        share_A([paths[0], paths[2]])
    else:

        def edit(tensors: dict[str, Tensor]) -> None:
            value = tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
            value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(math.inf))

        rewrite_tensors(paths[2] / WEIGHTS, edit)
    layer = r"layers\.1\.self_attn\.v_proj" if change == "bit" else r"layers\.0\.mlp\.down_proj"
    with pytest.raises(ValueError, match=rf"{layer}: method shared needs one lora_A.* use cat"):
        merge(paths, tmp_path / "m", MergeMethod("shared"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_recompression_is_what_resizing_the_sum_writes(tmp_path, rank):
    paths, weights = three(tmp_path), [0.4, -1.3, 0.7]
    merged = merge(paths, tmp_path / "m", MergeMethod("svd", rank=rank), weights=weights)
    resized = resize(paths, tmp_path / "r", RankRule(rank=rank), weights=weights)
    assert equal_bits(load_file(tmp_path / "m" / WEIGHTS), load_file(tmp_path / "r" / WEIGHTS))
    total = exact_sum(paths, weights)
    assert_reported(merged, total, deltas(tmp_path / "m"))
    for layer, other in zip(merged.layers, resized.layers, strict=True):
        optimum = discarded(total[layer.name], layer.rank)
        assert layer.error == pytest.approx(optimum, rel=1e-4, abs=1e-6 * layer.norm)
        assert layer.relative_error == pytest.approx(other.relative_error, abs=1e-3)


# Pure functions


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[Term], Tensor]:
    """Terms of one layer, and their dense float64 sum; cancellation and zeros included."""
    first = draw(products(st.just(torch.float32)))
    out, inputs = first.lora_B.shape[0], first.lora_A.shape[1]
    terms, total = [], torch.zeros(out, inputs, dtype=torch.float64)
    for index in range(draw(st.integers(1, 4))):
        side = first
        if index and draw(st.booleans()):
            generator = torch.Generator().manual_seed(draw(seeds))
            rank = draw(st.integers(1, 5))
            side = Product(
                torch.randn(out, rank, generator=generator),
                torch.randn(rank, inputs, generator=generator),
            )
        weight = draw(st.sampled_from([-1.0, -0.3, 0.4, 1.0, 2.5]))
        scaling = lora_scaling(4, draw(st.integers(1, 9)), rslora=draw(st.booleans()))
        terms.append(Term(index, weight, LoraProduct(side.lora_A, side.lora_B, scaling)))
        total += weight * torch.from_numpy(lora_delta(side.lora_B, side.lora_A, scaling))
    return terms, total


def size_of(terms: Sequence[Term]) -> float:
    return sum(
        abs(coefficient(term)) * frobenius(term.delta.lora_B) * frobenius(term.delta.lora_A)
        for term in terms
    )


@given(sums())
def test_a_concatenation_of_any_terms_is_their_sum(case):
    terms, total = case
    lora_A, lora_B = concatenated(terms)
    assert len(lora_A) == sum(len(term.delta.lora_A) for term in terms)
    size = size_of(terms)
    assert frobenius(array(lora_B) @ array(lora_A) - array(total)) <= 1e-14 * size
    assert norm_of_sum(terms) == pytest.approx(frobenius(total), rel=1e-9, abs=1e-13 * size)
    assert distance_from_sum(lora_B, lora_A, terms) <= 1e-13 * size


@given(sums(), st.integers(1, 5), seeds)
def test_the_distance_from_a_sum_is_that_of_the_dense_matrices(case, rank, seed):
    terms, total = case
    generator = torch.Generator().manual_seed(seed)
    lora_B = torch.randn(total.shape[0], rank, generator=generator)
    lora_A = torch.randn(rank, total.shape[1], generator=generator)
    expected = frobenius(lora_delta(lora_B, lora_A) - array(total))
    found = distance_from_sum(lora_B, lora_A, terms)
    size = size_of(terms) + frobenius(lora_B) * frobenius(lora_A)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13 * size)


@given(sums())
def test_one_A_gives_the_sum_at_its_own_rank(case):
    terms, _ = case
    A, width = terms[0].delta.lora_A, terms[0].delta.lora_A.shape[0]
    shared = [
        Term(t.adapter, t.weight, LoraProduct(A, t.delta.lora_B[:, :1].repeat(1, width), 0.5))
        for t in terms
    ]
    lora_A, lora_B = on_shared_A(shared)
    assert torch.equal(lora_A.float(), A)
    assert distance_from_sum(lora_B, lora_A, shared) <= 1e-13 * size_of(shared)


# Through PEFT


def merged_in_a_model(
    paths: Sequence[Path], weights: Sequence[float], method: MergeMethod
) -> dict[str, Tensor]:
    """PEFT's `add_weighted_adapter` on the whole model."""
    names = [str(index) for index in range(len(paths))]
    model: Any = PeftModel.from_pretrained(tiny_model(), str(paths[0]), adapter_name="0")
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(str(path), adapter_name=name)
    options = {"svd_rank": method.rank, "density": method.density}
    if method.majority_sign_method:
        options["majority_sign_method"] = method.majority_sign_method
    model.add_weighted_adapter(
        names, list(weights), "merged", combination_type=method.name, **options
    )
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("merged").detach().double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "merged" in layer.lora_A
    }


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("method", PEFTS, ids=title)
def test_without_a_base_comes_out_what_peft_makes_in_the_whole_model(tmp_path, method):
    paths = three(tmp_path)
    # One layer type in one adapter alone: PEFT prunes there too.
    trained_adapter(paths[2], seed=3, target_modules=["q_proj", "o_proj"], lora_alpha=7)
    weights = [0.4, 0.7, 0.5]
    if not method.elects_signs:
        weights[1] = -0.7
    merged = merge(paths, tmp_path / "m", method, weights=weights)
    found, expected = deltas(tmp_path / "m"), merged_in_a_model(paths, weights, method)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert_reported(merged, exact_sum(paths, weights), found)
    assert merged.relative_error > 0.05


def test_linear_has_the_cross_terms_and_their_size_is_reported(tmp_path):
    paths, weights = three(tmp_path), [0.4, 0.7, -0.5]
    merged = merge(paths, tmp_path / "m", MergeMethod("linear"), weights=weights)
    total, sides = exact_sum(paths, weights), [load_file(path / WEIGHTS) for path in paths]
    scalings = [[3.0, 6.0, 10.0 if "q_proj" in name else 3.0] for name in total]
    for (name, delta), scaling in zip(total.items(), scalings, strict=True):
        key = f"base_model.model.{name}.lora_{{}}.weight"
        cross = torch.zeros_like(delta)
        for i, j in itertools.permutations(range(3), 2):
            root = math.sqrt(abs(weights[i] * scaling[i] * weights[j] * scaling[j]))
            sign = math.copysign(1.0, weights[j])
            B, A = sides[i][key.format("B")].double(), sides[j][key.format("A")].double()
            cross += sign * root * B @ A
        layer = next(layer for layer in merged.layers if layer.name == name)
        assert layer.error == pytest.approx(frobenius(cross), rel=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_linear_on_one_A_is_as_many_times_too_large_as_there_are_adapters(tmp_path, count):
    paths = [tmp_path / str(index) for index in range(count)]
    for seed, path in enumerate(paths):
        trained_adapter(path, seed=seed)
    share_A(paths)
    merged = merge(paths, tmp_path / "m", MergeMethod("linear"), weights=[0.4] * count)
    assert merged.relative_error == pytest.approx(count - 1, rel=1e-5)
    total = exact_sum(paths, [0.4] * count)
    for name, delta in deltas(tmp_path / "m").items():
        torch.testing.assert_close(delta, count * total[name], rtol=1e-4, atol=1e-6)


def test_dare_keeps_or_drops_whole_entries_and_scales_up_what_it_keeps(tmp_path):
    a, b, density = tmp_path / "a", tmp_path / "b", 0.4
    trained_adapter(a, seed=1)
    trained_adapter(b, seed=2)
    method = MergeMethod("dare_linear", density=density, seed=3)
    merge([a, b], tmp_path / "m", method, weights=[0.5, -0.8])
    found = load_file(tmp_path / "m" / WEIGHTS)
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    kept = entries = 0
    for key, value in found.items():
        sign = -1 if "lora_A" in key else 1
        x = math.sqrt(0.5 * 3) * first[key] / density
        y = sign * math.sqrt(0.8 * 3) * second[key] / density
        choices = torch.stack([0 * x, x, y, x + y])
        distance = (choices - value).abs()
        assert float(distance.amin(0).max()) < 1e-5
        chosen = distance.argmin(0)
        kept += int(((chosen == 1) | (chosen == 3)).sum())
        entries += value.numel()
    assert abs(kept / entries - density) < 4 * math.sqrt(density / entries)


def test_dare_repeats_with_its_seed_and_leaves_the_random_state_alone(tmp_path, monkeypatch):
    paths = three(tmp_path)
    torch.manual_seed(11)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    found = []
    for index, seed in enumerate([0, None, 1]):
        method = MergeMethod("dare_ties", density=0.5, seed=seed)
        merge(paths, tmp_path / str(index), method)
        found.append(load_file(tmp_path / str(index) / WEIGHTS))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not seeded, "those of other devices"
    assert equal_bits(found[0], found[1])
    assert not equal_bits(found[0], found[2])
    # Layers of one shape drop other entries each.
    keys = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in (0, 1)]
    assert not torch.equal(found[0][keys[0]] == 0, found[0][keys[1]] == 0)


# Laws


@pytest.mark.parametrize("method", [*ALL, MergeMethod("shared")], ids=title)
def test_an_adapter_of_weight_zero_is_not_there(tmp_path, method):
    paths = three(tmp_path)
    if method.name == "shared":
        share_A(paths[:2])
    with_it = merge(paths, tmp_path / "m", method, weights=[0.4, 0.7, 0.0])
    without = merge(paths[:2], tmp_path / "n", method, weights=[0.4, 0.7])
    assert equal_bits(load_file(tmp_path / "m" / WEIGHTS), load_file(tmp_path / "n" / WEIGHTS))
    assert with_it.left_out == (str(paths[2]),) and without.left_out == ()
    assert with_it.adapters == without.adapters and with_it.layers == without.layers
    assert f"their weight is 0: {paths[2]}." in (tmp_path / "m" / "merge_report.md").read_text()


@pytest.mark.parametrize("method", [m for m in ALL if m.density != 0.5], ids=title)
def test_the_order_of_the_adapters_does_not_matter(tmp_path, method):
    paths, weights = three(tmp_path), [0.4, 0.7, 0.5]
    merged = merge(paths, tmp_path / "m", method, weights=weights)
    turned = merge(
        [paths[i] for i in (2, 0, 1)], tmp_path / "n", method, weights=[weights[2], *weights[:2]]
    )
    found, other = deltas(tmp_path / "m"), deltas(tmp_path / "n")
    for name, delta in found.items():
        torch.testing.assert_close(delta, other[name], rtol=1e-4, atol=1e-5)
    assert merged.relative_error == pytest.approx(turned.relative_error, rel=1e-4, abs=1e-6)


def test_opposite_weights_of_one_adapter_cancel(tmp_path):
    trained_adapter(tmp_path / "a")
    pair = [tmp_path / "a", tmp_path / "a"]
    merged = merge(pair, tmp_path / "m", weights=[1.0, -1.0])
    assert merged.relative_error == 0.0 and {layer.norm for layer in merged.layers} == {0.0}
    linear = merge(pair, tmp_path / "n", MergeMethod("linear"), weights=[1.0, -1.0])
    assert linear.relative_error == 0.0
    pruned = merge(
        pair, tmp_path / "o", MergeMethod("dare_linear", density=0.5), weights=[1.0, -1.0]
    )
    assert pruned.relative_error == math.inf
    assert (
        json.loads((tmp_path / "o" / "merge_report.json").read_text())["totals"]["relative_error"]
        is None
    )
    assert "error inf " in (tmp_path / "o" / "merge_report.md").read_text()


# What is written


def test_the_report_holds_the_errors_and_the_interference_of_every_pair(tmp_path):
    paths, weights = three(tmp_path), [0.4, -0.7, 0.5]
    merged = merge(paths, tmp_path / "m", weights=weights)
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report == json.loads(json.dumps(merged.as_dict()))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "merge_report.json",
        "merge_report.md",
    ]
    dense = [torch.cat([d.flatten() for d in deltas(path).values()]) for path in paths]
    assert merged.norms == pytest.approx([frobenius(vector) for vector in dense])
    assert [pair["adapters"] for pair in report["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    for pair in report["pairs"]:
        i, j = pair["adapters"]
        cosine = torch.cosine_similarity(dense[i], dense[j], dim=0)
        assert pair["cosine"] == pytest.approx(float(cosine), abs=1e-6)
        assert 0.01 < pair["random_cosine"] < 0.1 and pair["support"] is None
    text = (tmp_path / "m" / "merge_report.md").read_text()
    assert f"{report['pairs'][2]['cosine']:+.2g}" in text and "method cat" in text.lower()
    assert all(f"`{layer.name}`" in text for layer in merged.layers)


def test_sparse_B_over_one_A_show_the_overlap_of_their_masks(tmp_path):
    paths = three(tmp_path)[:2]
    share_A(paths)
    masks: list[dict[str, Tensor]] = []
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)

        def prune(tensors: dict[str, Tensor], generator: torch.Generator = generator) -> None:
            for key, value in tensors.items():
                if "lora_B" in key:
                    tensors[key] = value * (torch.rand(value.shape, generator=generator) < 0.3)

        rewrite_tensors(path / WEIGHTS, prune)
        masks.append({k: v != 0 for k, v in load_file(path / WEIGHTS).items() if "lora_B" in k})
    merged = merge(paths, tmp_path / "m")
    both = sum(int((masks[0][key] & masks[1][key]).sum()) for key in masks[0])
    either = sum(int((masks[0][key] | masks[1][key]).sum()) for key in masks[0])
    support = merged.pairs[0].interference.support
    assert support is not None and (support.both, support.either) == (both, either)
    text = (tmp_path / "m" / "merge_report.md").read_text()
    assert f"{both / either:.1%}" in text and "method shared" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_error_of_half_precision_is_that_of_what_is_stored(tmp_path, dtype):
    paths, weights = three(tmp_path), [0.4, 0.7, 0.5]
    merged = merge(paths, tmp_path / "m", weights=weights, dtype=dtype)
    stored = load_file(tmp_path / "m" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
    assert merged.dtypes == {dtype: 6}
    assert_reported(merged, exact_sum(paths, weights), deltas(tmp_path / "m"))
    assert 1e-5 < merged.relative_error < 5e-3


def test_the_selection_of_layers_and_the_base_carry_over(tmp_path):
    paths = three(tmp_path)
    merge(paths, tmp_path / "m")
    before, after = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (paths[0], tmp_path / "m")
    )
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    assert (after["r"], after["lora_alpha"], after["use_rslora"]) == (12, 12, False)
    assert after["base_model_name_or_path"] == "tiny-llama"


# Wrong inputs


def assert_refused(
    paths: Sequence[Path], message: str, method: Any = EXACT, **options: Any
) -> None:
    output = options.pop("output", paths[0].parent / "m" if paths else Path("nowhere"))
    there = sorted(output.iterdir()) if output.is_dir() else output.exists()
    with pytest.raises(ValueError, match=message):
        merge(paths, output, method, **options)
    assert there == (sorted(output.iterdir()) if output.is_dir() else output.exists())


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    paths = three(tmp_path)
    assert_refused(paths[:1], "two at least; svdinit resize is for one")
    lycoris_peft(tmp_path / "loha", LoHaConfig(r=2, target_modules=["q_proj"]))
    assert_refused([paths[0], tmp_path / "loha"], "of type LORA, got .*loha; svdinit resize")
    kohya_lora(tmp_path / "k.safetensors")
    assert_refused([tmp_path / "k.safetensors"] * 2, "of type LORA, got .*k.safetensors")
    trained_adapter(tmp_path / "dora", use_dora=True)
    assert_refused(
        [paths[0], tmp_path / "dora"], "lora_magnitude_vector in .*dora is a magnitude .* extract"
    )
    trained_adapter(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"])

    def rename(tensors: dict[str, Tensor]) -> None:
        name = "transformer.h.0.attn.c_attn"
        for side in ("lora_A", "lora_B"):
            value = tensors.pop(f"base_model.model.{name}.{side}.weight")
            tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{side}.weight"] = value

    rewrite_tensors(tmp_path / "gpt2" / WEIGHTS, rename)
    unselected = r"gpt2 stores layer .*q_proj, which .* does not select \(target_modules\)"
    assert_refused([paths[0], tmp_path / "gpt2"], unselected)
    config = json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn", "q_proj"]
    (tmp_path / "gpt2" / "adapter_config.json").write_text(json.dumps(config))
    assert_refused([paths[0], tmp_path / "gpt2"], r"q_proj has another shape in each adapter")
    truncate(paths[2] / WEIGHTS)
    assert_refused(paths, "not a readable safetensors file")
    with pytest.raises(FileNotFoundError):
        merge([paths[0], tmp_path / "none"], tmp_path / "m")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_is_refused_by_layer_and_nothing_is_written(tmp_path, bad):
    paths = three(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][2, 1] = bad

    rewrite_tensors(paths[1] / WEIGHTS, spoil)
    assert_refused(paths, r"layers\.1\.mlp\.down_proj\.lora_B.* in .*b.*NaN or infinite")
    assert not (tmp_path / "m").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    paths = three(tmp_path)
    assert_refused(paths, "one per adapter, got 2 for 3", weights=[1.0, 2.0])
    assert_refused(paths, "weights must be finite", weights=[1.0, math.inf, 1.0])
    assert_refused(paths, "3 of 3 are 0, which leaves too few", weights=[0.0, 0.0, 0.0])
    linear = MergeMethod("linear")
    assert_refused(paths, "2 of 3 are 0.* method linear", linear, weights=[0.0, 1.0, 0.0])
    for name in ("ties", "dare_ties", "ties_svd", "dare_ties_svd"):
        rank = 2 if name.endswith("svd") else None
        method = MergeMethod(name, rank=rank, density=0.5)
        message = rf"positive with method {name}, but .*b has -1.0: PEFT elects .* use cat"
        assert_refused(paths, message, method, weights=[1.0, -1.0, 1.0])


def test_what_a_layer_cannot_do_is_refused_by_its_name(tmp_path):
    paths = three(tmp_path)
    trained_adapter(tmp_path / "d", r=3)
    message = r"layers\.0\.mlp\.down_proj: method linear adds up .* ranks here are 4, 3; use cat"
    assert_refused([paths[0], tmp_path / "d"], message, MergeMethod("linear"))
    message = r"layers\.0\.mlp\.down_proj: density 0.001 keeps nothing with method ties"
    assert_refused(paths, message, MergeMethod("ties", density=0.001))
    message = r"layers\.0\.mlp\.down_proj: lora_B has an entry of size .* above the 65504"
    huge = [1e7, 1.0, 1.0]
    assert_refused(paths, message, MergeMethod("svd", rank=2), weights=huge, dtype="float16")
    assert_refused(paths, "dtype must be one of", dtype="int8")


def test_outputs_that_would_lose_something_are_refused(tmp_path):
    paths = three(tmp_path)
    assert_refused(paths, "must not be an input", output=paths[1])
    assert_refused(paths, "must not be an input", output=paths[2], weights=[1.0, 1.0, 0.0])
    inner = paths[0] / "second"  # as PEFT saves a model's further adapters
    shutil.copytree(paths[1], inner)
    assert_refused(
        [inner, paths[1]], "output must not hold an input, but .*second", output=paths[0]
    )
    assert inner.is_dir()


def test_other_base_models_of_the_same_shapes_are_named_in_a_warning(tmp_path, caplog):
    paths = three(tmp_path)
    with caplog.at_level(logging.WARNING):
        merge(paths, tmp_path / "m")
    assert not caplog.records
    config = json.loads((paths[1] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere"
    (paths[1] / "adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        merge(paths, tmp_path / "m")
    assert "different base models" in caplog.text and "elsewhere" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sum"}, "method must be one of cat, shared, .* got 'sum'"),
        ({"name": "svd"}, "method svd needs rank"),
        ({"name": "ties_svd", "density": 0.5}, "method ties_svd needs rank"),
        ({"name": "svd", "rank": 0}, "rank must be at least 1, got 0"),
        ({"name": "cat", "rank": 4}, "rank is for svd .* leave it out with method cat"),
        ({"name": "cat", "density": 0.5}, "density is for ties, .* leave it out with method cat"),
        ({"name": "linear", "density": 0.5}, "leave it out with method linear"),
        ({"name": "ties"}, "method ties needs density"),
        ({"name": "ties", "density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"name": "ties", "density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"name": "ties", "density": math.nan}, r"density must be in \(0, 1\], got nan"),
        ({"name": "ties", "density": 0.5, "seed": 1}, "seed is for dare"),
        (
            {"name": "dare_linear", "density": 0.5, "majority_sign_method": "total"},
            "majority_sign_method is for ties",
        ),
        (
            {"name": "ties", "density": 0.5, "majority_sign_method": "most"},
            "must be one of total, frequency, got 'most'",
        ),
    ],
)
def test_contradictory_options_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        MergeMethod(**options)


def test_every_method_is_tested_here():
    assert {method.name for method in ALL} | {"shared"} == set(METHODS)
