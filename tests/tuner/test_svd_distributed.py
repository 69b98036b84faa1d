"""Starts in several processes: equal on all, the same on split parameters as on whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from support.launching import reports, run_training
from support.peft_fixtures import equal_bits, logits, make_scene, tiny_base
from support.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def without_deepspeed(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the reports of DDP, `fully_shard` and tensor parallelism."""
    folder = tmp_path_factory.mktemp("fsdp2")
    make_scene(folder)
    run_training("fsdp2_starts.py", str(folder))
    found = reports(folder)
    assert [each["world_size"] for each in found] == [2, 2]
    return folder, found


def test_under_ddp_all_processes_hold_the_same_adapter(without_deepspeed):
    _, (one, other) = without_deepspeed
    assert one["ddp"] == other["ddp"]


def test_factors_of_a_fully_sharded_model_are_those_of_a_whole_one(without_deepspeed):
    for report in without_deepspeed[1]:
        assert report["of_data"] < 1e-5


def test_a_fully_sharded_adapter_is_started(without_deepspeed):
    for report in without_deepspeed[1]:
        assert report["afterwards"] < 1e-6


@pytest.mark.parametrize("start", ["delta", "reference"])
def test_a_fully_sharded_start_trains_and_is_saved_as_by_one_process(without_deepspeed, start):
    folder, found = without_deepspeed
    for report in found:
        trained = report["trained"][start]
        assert trained["losses"] == pytest.approx(trained["expected"], rel=1e-5)
    one, expected = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in (start, f"{start}-expected")
    )
    assert one.keys() == expected.keys()
    assert max((one[key] - expected[key]).abs().max().item() for key in one) < 1e-6
    stock = PeftModel.from_pretrained(tiny_base(), str(folder / start))
    assert (logits(stock) - logits(tiny_base())).abs().max() > 1e-2


def test_another_base_is_refused_where_its_weights_are_sharded(without_deepspeed):
    for report in without_deepspeed[1]:
        said = report["refusals"]["another base"]
        assert said.startswith("ValueError: svd_factors were taken from another base model")
        assert "layers.1.self_attn.v_proj differ" in said


def check_other_batches_were_refused(said: list[str]) -> None:
    assert len(said) == 3
    for text in said:
        assert text.startswith("ValueError: batches differ between the processes that hold"), text


def test_other_batches_in_each_process_are_refused_in_all(without_deepspeed):
    for report in without_deepspeed[1]:
        check_other_batches_were_refused(report["other_batches"])


def test_all_processes_search_by_the_losses_of_the_first(without_deepspeed):
    _, (one, other) = without_deepspeed
    assert one["searched"] == other["searched"]


def test_linear_layers_that_are_sharded_themselves_are_found(without_deepspeed):
    for report in without_deepspeed[1]:
        assert report["lost"] == []


def test_layers_split_by_tensor_parallelism_are_refused_by_name(without_deepspeed):
    for report in without_deepspeed[1]:
        said = {key: text for key, text in report["refusals"].items() if key.startswith("tp")}
        assert set(said) == {"tp svd", "tp lori", "tp afterwards", "tp gradient", "tp and fsdp"}
        for text in said.values():
            assert "layer model.layers.0.mlp.down_proj is split by tensor parallelism" in text


def test_an_adapter_on_a_base_that_is_sharded_already_is_refused(without_deepspeed):
    for report in without_deepspeed[1]:
        for n in range(2):
            said = report["refusals"][f"shards first {n}"]
            assert said.startswith("RuntimeError: layer model.layers.0.") and "fully_shard" in said


@pytest.mark.deepspeed
def test_starts_under_zero3_are_those_of_one_process(tmp_path):
    for architecture in ARCHITECTURES:
        scene = make_scene(tmp_path, architecture)
        scene.base.save_pretrained(tmp_path / architecture)
    options = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    (tmp_path / "zero3.json").write_text(json.dumps(options))
    run_training("zero3_starts.py", str(tmp_path))
    one, other = reports(tmp_path)
    assert one["digests"] == other["digests"]
    for report in (one, other):
        assert report["world_size"] == 2 and report["empty"] == 1
        assert len(report["differences"]) == 13
        assert max(report["differences"].values()) < 1e-5, report["differences"]
        assert "weights of layer model.layers.1.self_attn.v_proj differ" in report["other_base"]
        check_other_batches_were_refused(report["other_batches"])
        assert set(report["late"]) == {"0", "2", "3"}
        for stage, text in report["late"].items():
            name = "layers.0.self_attn.q_proj: adapter 'default' is in a DeepSpeed engine"
            assert text.startswith("RuntimeError") and name in text, (stage, text)
        assert 1 <= report["peak_over_one_layer"] <= 1.5
        assert report["after_error"] == "KeyError: 0 whole, 0 lent"
        assert report["trainable"].startswith("RuntimeError: parameter weight of model.embed_token")
        assert report["reads_others"].startswith(
            "RuntimeError: DebertaV2ForSequenceClassification failed"
        )
    expected = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    assert equal_bits(load_file(tmp_path / "final" / "adapter_model.safetensors"), expected)
    stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "final"))
    assert (logits(stock) - logits(tiny_base())).abs().max() < 1e-5  # A start by reference.
