"""A base and a fine-tune in other dtypes: what rounding changed is no fine-tuning."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import SavedPair, save_pair, tiny_model, weight_of
from torch import nn

from peft_svdinit.adapters import AdapterForm, extract_adapter
from peft_svdinit.factors import CheckpointPair, RankRule, factors_of_checkpoints, rounding_share

HALVES = [torch.bfloat16, torch.float16]
TRAINED = "model.layers.1.self_attn.q_proj"
LAYERS_ONLY = AdapterForm(verify="layers")


def rounded_pair(
    folder: Path,
    narrow: torch.dtype,
    *,
    wide_side: str = "base",
    stored: torch.dtype | None = None,
    change: Any = lambda name: name.startswith(TRAINED),
) -> SavedPair:
    """A pair of which one side went through `narrow`, saved as that or as `stored`."""
    pair = save_pair(folder, change=change)
    side, target = (
        (pair.tuned, pair.tuned_folder) if wide_side == "base" else (pair.base, pair.base_folder)
    )
    nn.Module.to(side, dtype=narrow)
    nn.Module.to(side, dtype=stored or narrow)
    side.save_pretrained(str(target))
    return pair


def opened(pair: SavedPair) -> CheckpointPair:
    return CheckpointPair(pair.base_folder, pair.tuned_folder)


@pytest.mark.parametrize("narrow", HALVES)
@pytest.mark.parametrize("wide_side", ["base", "tuned"])
@pytest.mark.parametrize("stored", [None, torch.float32])
def test_layers_that_were_only_rounded_have_no_delta(tmp_path, narrow, wide_side, stored):
    pair = opened(rounded_pair(tmp_path, narrow, wide_side=wide_side, stored=stored))
    assert len(pair) == 14
    for name, delta in pair.items():
        assert bool(delta.any()) == (name == TRAINED), name
        assert pair.is_rounding(name) == (name != TRAINED), name
    assert [tensor.key for tensor in pair.uncovered()] == []
    assert "model.embed_tokens.weight" in pair.rounded_tensors


@pytest.mark.parametrize("narrow", HALVES)
def test_the_delta_of_a_trained_layer_keeps_every_entry(tmp_path, narrow):
    saved = rounded_pair(tmp_path, narrow)
    delta = opened(saved)[TRAINED]
    before, after = (weight_of(model, TRAINED) for model in (saved.base, saved.tuned))
    assert torch.equal(delta, after.float() - before.float())


def test_ranks_go_to_the_trained_layer_alone_and_the_report_says_so(tmp_path, caplog):
    pair = opened(rounded_pair(tmp_path, torch.bfloat16))
    extracted = extract_adapter(
        pair,
        tmp_path / "adapter",
        RankRule(energy=0.9999, max_rank=16),
        LAYERS_ONLY,
        base_model_name_or_path="tiny",
    )
    ranks = {layer.name: layer.rank for layer in extracted.exported.layers}
    assert [name for name, rank in ranks.items() if rank] == [TRAINED]
    report = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert len(report["zero_layers"]) == 13
    assert set(report["zero_layers"]) < set(report["unchanged_but_for_rounding"])
    assert report["uncovered"] == {}
    text = (tmp_path / "adapter" / "extraction.md").read_text()
    assert "13 layers and 2 other tensors differ from the base's by rounding" in text
    assert "13 layers and 2 other tensors of tuned are those of base but for the" in caplog.text


@pytest.mark.parametrize("wide_side", ["base", "tuned"])
def test_the_rounding_in_trained_layers_is_measured_and_said(tmp_path, wide_side):
    saved = rounded_pair(tmp_path, torch.bfloat16, wide_side=wide_side, change=lambda name: True)
    pair = opened(saved)
    fine = saved.base if wide_side == "base" else saved.tuned
    noise = size = 0.0
    for name, delta in pair.items():
        weight = weight_of(fine, name)
        noise += (weight.bfloat16().float() - weight).square().sum().item()
        size += delta.square().sum().item()
    norms = {name: delta.norm().item() for name, delta in pair.items()}
    share = rounding_share(pair, norms)
    assert share == pytest.approx((noise / size) ** 0.5, rel=0.15) and share < 0.1
    extracted = extract_adapter(
        pair, tmp_path / "a", RankRule(rank=2), LAYERS_ONLY, base_model_name_or_path="tiny"
    )
    assert extracted.rounding_share == pytest.approx(share)
    assert "of the norm of the deltas is rounding" not in extracted.as_text()
    said = replace(extracted, rounding_share=0.4).as_text()
    assert "About 40% of the norm of the deltas is rounding" in said


def test_pairs_of_one_dtype_have_no_rounding(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        saved = save_pair(tmp_path / str(dtype), dtype=dtype)
        pair = opened(saved)
        assert rounding_share(pair, dict.fromkeys(pair, 1.0)) == 0.0


def test_an_extraction_that_is_resumed_says_the_same(tmp_path, monkeypatch):
    saved = rounded_pair(tmp_path, torch.bfloat16)
    rule = RankRule(rank=2)
    with monkeypatch.context() as patch:
        path = "peft_svdinit.adapters.extraction.extract.export_adapter"
        patch.setattr(path, lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_adapter(opened(saved), tmp_path / "a", rule, base_model_name_or_path="tiny")
    form = AdapterForm(verify="none")
    extracted = extract_adapter(
        opened(saved), tmp_path / "a", rule, form, base_model_name_or_path="tiny"
    )
    assert len(extracted.rounded) == 13 and len(extracted.rounded_tensors) == 2


def test_a_single_entry_beyond_rounding_makes_a_layer_changed(tmp_path):
    saved = rounded_pair(tmp_path, torch.bfloat16)
    other = "model.layers.0.mlp.down_proj"
    tuned = copy.deepcopy(saved.tuned)
    weight_of(tuned, other)[3, 4] += 0.01
    tuned.save_pretrained(str(saved.tuned_folder))
    pair = opened(saved)
    assert pair[other].any() and not pair.is_rounding(other)


def test_a_fine_tune_that_is_a_cast_alone_is_refused(tmp_path):
    pair = opened(rounded_pair(tmp_path, torch.bfloat16, change=lambda name: False))
    for extract in (
        lambda: extract_adapter(
            pair, tmp_path / "a", RankRule(rank=2), base_model_name_or_path="tiny"
        ),
        lambda: factors_of_checkpoints(pair, 2, base_model_name_or_path="tiny"),
    ):
        with pytest.raises(ValueError, match=r"all equal the base's, but for rounding"):
            extract()
    assert not (tmp_path / "a").exists()


def test_factors_in_memory_say_it_too(tmp_path, caplog):
    pair = opened(rounded_pair(tmp_path, torch.float16))
    extraction = factors_of_checkpoints(pair, 2, base_model_name_or_path="tiny")
    assert [name for name, layer in extraction.factors.items() if layer.norm] == [TRAINED]
    assert "13 layers and 0 other tensors of tuned are those of base but for" in caplog.text


def test_training_of_all_layers_in_float32_from_a_base_in_bfloat16_is_kept(tmp_path):
    base = tiny_model()
    nn.Module.to(base, dtype=torch.bfloat16)
    base.save_pretrained(str(tmp_path / "base"))
    tuned = copy.deepcopy(base).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1e-5 * torch.randn(parameter.shape, generator=generator).sign()
    tuned.save_pretrained(str(tmp_path / "tuned"))
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    assert not any(pair.is_rounding(name) for name in pair)
    assert pair.uncovered() and not pair.rounded_tensors
