"""From adapters and checkpoint pairs to the factors of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.allocations import LargestResult
from support.tiny_models import (
    ARCHITECTURES,
    Architecture,
    save_pair,
    tiny_model,
    trained_adapter,
    weight_of,
)
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peft_svdinit import FactorsFile, LowRankFactors, save_factors
from peft_svdinit.factors import (
    CheckpointPair,
    Extraction,
    LoraAdapter,
    Synthesis,
    factors_of_adapter,
    factors_of_checkpoints,
)
from peft_svdinit.models import recognition_sample


def assert_equal_bits(first: Extraction, second: Extraction) -> None:
    assert first.factors.keys() == second.factors.keys()
    for name, layer in first.factors.items():
        other = second.factors[name]
        assert all(torch.equal(getattr(layer, p), getattr(other, p)) for p in ("U", "S", "Vh"))
        assert layer.norm == other.norm
    assert first.metadata == second.metadata


def base_folder(tmp_path: Path, architecture: Architecture = "llama", **options: Any) -> Path:
    folder = tmp_path / "base"
    tiny_model(architecture, **options).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_of_an_adapter_are_its_delta(tmp_path, architecture):
    trained_adapter(tmp_path, architecture)
    adapter = LoraAdapter(tmp_path)
    extraction = factors_of_adapter(adapter)
    assert list(extraction.factors) == list(adapter)
    for name, layer in extraction.factors.items():
        product = adapter[name]
        delta = reference.lora_delta(product.lora_B, product.lora_A, product.scaling)
        assert layer.rank == 4
        assert_close(layer.dense().double(), torch.from_numpy(delta), rtol=0, atol=1e-5)
    assert extraction.base_samples == {}
    metadata = extraction.metadata
    assert metadata.base_model_name_or_path == f"tiny-{architecture}"
    assert (metadata.source, metadata.method, metadata.seed) == ({"kind": "adapter"}, "exact", None)


def test_no_matrix_of_the_size_of_a_delta_is_made(tmp_path):
    trained_adapter(tmp_path, r=1)
    adapter = LoraAdapter(tmp_path)
    with LargestResult() as largest:
        extraction = factors_of_adapter(adapter, synthesis=Synthesis(2))
    assert (
        0
        < largest.entries
        < min(layer.U.shape[0] * layer.Vh.shape[1] for layer in extraction.factors.values())
    )


def test_a_synthesis_extends_every_layer_and_is_noted(tmp_path):
    trained_adapter(tmp_path)
    adapter, synthesis = LoraAdapter(tmp_path), Synthesis(8, seed=5)
    plain, extended = factors_of_adapter(adapter), factors_of_adapter(adapter, synthesis=synthesis)
    for name, layer in extended.factors.items():
        assert layer.rank == 8
        assert torch.equal(layer.S[:4], plain.factors[name].S)
        assert torch.equal(layer.U, synthesis(name, plain.factors[name]).U)
    assert extended.metadata.seed == 5
    assert extended.metadata.source == {
        "kind": "synthesised",
        "adapter_rank": 4,
        "rank": 8,
        "tail_decay": 0.1,
        "noise_share": 0.1,
        "seed": 5,
    }
    assert_equal_bits(extended, factors_of_adapter(adapter, synthesis=synthesis))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_of_the_base_are_those_of_the_loaded_model(tmp_path, architecture):
    trained_adapter(tmp_path / "adapter", architecture)
    base = base_folder(tmp_path, architecture)
    extraction = factors_of_adapter(LoraAdapter(tmp_path / "adapter"), base=base)
    model = tiny_model(architecture)
    assert extraction.base_samples.keys() == extraction.factors.keys()
    for name, sample in extraction.base_samples.items():
        weight = weight_of(model, name)
        if isinstance(model.get_submodule(name), Conv1D):
            weight = weight.mT
        assert torch.equal(sample, recognition_sample(weight))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("gpt2", {}, "matches no linear layer"),
        ("llama", {"num_hidden_layers": 1}, r"base: .* has no linear layer model.layers.1"),
        ("llama", {"intermediate_size": 32}, r"no linear layer .*down_proj of shape \(16, 24\)"),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(tmp_path, architecture, options, message):
    trained_adapter(tmp_path / "adapter")
    base = base_folder(tmp_path, architecture, **options)
    with pytest.raises(ValueError, match=message):
        factors_of_adapter(LoraAdapter(tmp_path / "adapter"), base=base)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_of_a_pair_are_the_truncated_deltas_with_their_exact_norms(
    tmp_path, architecture, method
):
    saved = save_pair(tmp_path, architecture)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    extraction = factors_of_checkpoints(pair, 6, base_model_name_or_path="tiny", method=method)
    assert list(extraction.factors) == list(pair)
    for name, layer in extraction.factors.items():
        delta = pair[name]
        assert layer.rank == min(6, *delta.shape)
        assert layer.norm == pytest.approx(reference.frobenius(delta), rel=1e-12)
        lost = reference.frobenius(reference.array(delta) - reference.array(layer.dense()))
        assert lost <= 1.03 * reference.discarded(delta, layer.rank) + 1e-6
        assert torch.equal(extraction.base_samples[name], pair.base.sample(name))
    metadata = extraction.metadata
    assert metadata.base_model_name_or_path == "tiny"
    source = {"kind": "checkpoints", "architecture": type(tiny_model(architecture)).__name__}
    assert (metadata.source, metadata.method, metadata.seed) == (source, method, 0)


def test_extracting_twice_gives_equal_bits_and_leaves_the_global_random_state(tmp_path):
    saved = save_pair(tmp_path, sharded=True)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    before = torch.get_rng_state()
    first, second = (
        factors_of_checkpoints(pair, 3, base_model_name_or_path="tiny", seed=7) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_bits(first, second)


def test_the_seed_decides_the_sketch(tmp_path):
    saved = save_pair(tmp_path)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    first, second = (
        factors_of_checkpoints(
            pair, 2, base_model_name_or_path="tiny", method="randomized", seed=seed
        ).factors
        for seed in (0, 1)
    )
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(first[name].U, second[name].U)


def test_the_rank_is_capped_layer_by_layer(tmp_path):
    saved = save_pair(tmp_path)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    extraction = factors_of_checkpoints(pair, 1000, base_model_name_or_path="tiny")
    for name, layer in extraction.factors.items():
        assert layer.rank == min(pair[name].shape)
        assert_close(layer.dense(), pair[name], rtol=0, atol=1e-5)


def test_equal_checkpoints_are_refused(tmp_path):
    saved = save_pair(tmp_path, change=lambda name: "embed" in name)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    with pytest.raises(ValueError, match="tuned: its linear layers all equal the base's"):
        factors_of_checkpoints(pair, 2, base_model_name_or_path="tiny")


def test_a_layer_that_did_not_change_has_factors_of_zero(tmp_path):
    saved = save_pair(tmp_path, change=lambda name: "q_proj" in name)
    pair = CheckpointPair(saved.base_folder, saved.tuned_folder)
    factors = factors_of_checkpoints(pair, 2, base_model_name_or_path="tiny").factors
    assert {name.rpartition(".")[2] for name, layer in factors.items() if layer.norm} == {"q_proj"}
    unchanged = factors["model.layers.0.mlp.up_proj"]
    assert unchanged.energy() == 1.0 and torch.isfinite(unchanged.U).all()


@pytest.mark.parametrize("source", ["adapter", "synthesised", "checkpoints"])
def test_every_source_gives_the_same_kind_of_file(tmp_path, source):
    if source == "checkpoints":
        saved = save_pair(tmp_path)
        extraction = factors_of_checkpoints(
            CheckpointPair(saved.base_folder, saved.tuned_folder), 6, base_model_name_or_path="tiny"
        )
    else:
        trained_adapter(tmp_path / "adapter")
        extraction = factors_of_adapter(
            LoraAdapter(tmp_path / "adapter"),
            synthesis=Synthesis(6) if source == "synthesised" else None,
            base=base_folder(tmp_path),
        )
    path = save_factors(
        tmp_path, extraction.factors, extraction.metadata, base_samples=extraction.base_samples
    )
    file = FactorsFile(path)
    assert set(file) == set(extraction.factors)
    assert file.metadata == extraction.metadata and file.metadata.source["kind"] == source
    for name, layer in extraction.factors.items():
        assert isinstance(file[name], LowRankFactors)
        assert torch.equal(file[name].U, layer.U)
        sample = file.base_sample(name)
        assert sample is not None and torch.equal(sample.entries, extraction.base_samples[name])
