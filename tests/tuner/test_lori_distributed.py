"""LoRI in several processes: what is reduced, sharded, saved, and that all processes agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.launching import reports, run_training, zero3_file
from support.lori_fixtures import lori_model, reloaded
from support.peft_fixtures import logits, tiny_base

pytestmark = pytest.mark.slow


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def check_final(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The final adapter is whole, as expected but for rounding, and the same for stock PEFT."""
    found = adapter(folder)
    assert found.keys() == expected.keys()
    assert max((found[key] - expected[key]).abs().max().item() for key in found) < 1e-6
    ours, stock = (
        reloaded(folder / "final"),
        PeftModel.from_pretrained(tiny_base(), str(folder / "final")),
    )
    assert torch.equal(logits(stock), logits(ours))
    assert (logits(ours) - logits(tiny_base())).abs().max() > 1e-2


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The run of one process whose batch is that of two."""
    folder = tmp_path_factory.mktemp("single")
    run_training("lori_process.py", str(folder), "4", processes=1)
    return folder


def test_two_processes_reduce_the_trained_entries_alone_and_agree(tmp_path, single):
    run_training("lori_process.py", str(tmp_path), "2")
    (one, other), (alone,) = reports(tmp_path), reports(single)
    assert one["wrapper"] == other["wrapper"] == "DistributedDataParallel"
    assert one["world_size"] == 2 and alone["world_size"] == 1
    kept = lori_model(lori_scope="matrix").peft_config["default"].mask.kept
    assert one["trained"] == kept
    # Float32 gradients of the values, and no mask among the buffers sent at every step.
    assert one["reduced_bytes"] == 4 * kept
    assert one["lora_buffers"] == []
    assert one["state_sizes"] == one["sizes"]
    assert one["hash"] == other["hash"]
    assert one["off_mask_moved"] == []
    assert one["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    check_final(tmp_path, adapter(single))


@pytest.mark.deepspeed
def test_zero3_trains_saves_and_resumes_as_one_process_does(tmp_path, single):
    options = zero3_file(tmp_path)
    run_training("lori_process.py", str(tmp_path), "2", options)
    for report in reports(tmp_path):
        assert report["wrapper"] == "DeepSpeedEngine" and report["world_size"] == 2
        assert report["losses"] == pytest.approx(reports(single)[0]["losses"], rel=1e-5)
    check_final(tmp_path, adapter(single))
    whole = adapter(tmp_path)
    for later in tmp_path.glob("checkpoint-4/*"):
        if later.name == "adapter_model.safetensors":
            assert load_file(later).keys() == whole.keys()
    (tmp_path / "checkpoint-4").rename(tmp_path / "not-resumed")
    run_training("lori_process.py", str(tmp_path), "2", options, "--resume")
    resumed = adapter(tmp_path)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_fully_sharded_parameters_train_and_are_saved_whole(tmp_path):
    run_training("lori_sharded.py", str(tmp_path))
    (one, other) = reports(tmp_path)
    assert one["sharded"] == other["sharded"] == one["trained"] > 0
    assert one["losses"] == pytest.approx(one["expected_losses"], rel=1e-5)
    assert one["difference"] < 1e-6 and other["difference"] < 1e-6
    assert "layers.0.self_attn.q_proj: its values are sharded" in one["refused"]
    assert one["refused"] == other["refused"]
    stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "final"))
    assert torch.equal(logits(stock), logits(reloaded(tmp_path / "final")))


def test_a_calibration_whose_first_process_cannot_write_ends_in_all_of_them(tmp_path):
    said = run_training("spared_process.py", str(tmp_path))
    assert [each["steps"] for each in reports(tmp_path)] == [2, 2]
    assert reports(tmp_path)[0]["world_size"] == 2
    assert said.count("LoriCalibrationCallback leaves no lori_scores.safetensors and") == 1
    trained = adapter(tmp_path)
    assert any(value.any() for key, value in trained.items() if "lora_B" in key)
