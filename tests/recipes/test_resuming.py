"""Which checkpoint a recipe goes on from, and what it says of the others."""

from __future__ import annotations

import json
from types import SimpleNamespace

import progressive_lowrank
import pytest
import train_full_teacher
import train_lora
import train_lori
from stages import resuming
from stages.resuming import checkpoint_to_resume
from support.checkpoint_files import saved, tensors

from peft_svdinit.low_rank import LowRankRule
from peft_svdinit.training import RecipeArguments
from trainer_callbacks import (
    AtStep,
    LoriCalibrationCallback,
    LowRankCheckpointsCallback,
    RankSwitchCallback,
)


def arguments(folder, resume: str | None = "last") -> RecipeArguments:
    return RecipeArguments(output_dir=str(folder), resume_from_checkpoint=resume, use_cpu=True)


def test_the_newest_whole_checkpoint_is_taken_and_later_ones_told(tmp_path):
    said: list[str] = []
    assert checkpoint_to_resume(arguments(tmp_path / "none"), report=said.append) is None
    for step in (2, 4, 6):
        saved(tmp_path, step)
    assert checkpoint_to_resume(arguments(tmp_path, None), report=said.append) is None
    last = checkpoint_to_resume(arguments(tmp_path), report=said.append)
    assert last == str(tmp_path / "checkpoint-6") and not said
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
    last = checkpoint_to_resume(arguments(tmp_path), report=said.append)
    assert last == str(tmp_path / "checkpoint-2")
    told = (
        "checkpoint-6 is passed over: its optimizer.pt is torn; checkpoint-4 is passed over: it "
        "has no rng_state.pth"
    )
    assert said == [f"resume: goes on from checkpoint-2; {told}"]
    (tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    assert checkpoint_to_resume(arguments(tmp_path), report=said.append) is None
    assert said[1:] == [f"resume: no checkpoint in {tmp_path} is whole, begins anew; {told}"]


@pytest.mark.parametrize("found", [["there/checkpoint-2", None], [None, "it is not whole"]])
def test_other_processes_take_what_the_main_one_found(tmp_path, monkeypatch, found):
    def broadcast(told: list) -> None:
        told[:] = found

    (saved(tmp_path, 6) / "optimizer.pt").unlink()
    monkeypatch.setattr(resuming, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(resuming, "broadcast_object_list", broadcast)
    if found[1]:
        with pytest.raises(ValueError, match=found[1]):
            checkpoint_to_resume(arguments(tmp_path), report=pytest.fail)
    else:
        assert checkpoint_to_resume(arguments(tmp_path), report=pytest.fail) == found[0]


SWITCHED = {"rank_switch": {"attributes": {"options": {}, "done": [{"step": 2}]}}}


@pytest.mark.parametrize(
    ("callback", "kept", "lacks"),
    [
        (LoriCalibrationCallback(density=None), {}, []),
        (LoriCalibrationCallback(density=None, score="gradient"), {}, ["lori_scores.safetensors"]),
        (LowRankCheckpointsCallback(), {}, ["low_rank.json", "low_rank.safetensors"]),
        (RankSwitchCallback(LowRankRule(0.5), AtStep(1)), {}, []),
        (
            RankSwitchCallback(LowRankRule(0.5), AtStep(1)),
            SWITCHED,
            ["low_rank.json", "low_rank.safetensors"],
        ),
    ],
)
def test_what_a_callback_reads_of_a_checkpoint_must_be_there(tmp_path, callback, kept, lacks):
    folder = saved(tmp_path)
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"] |= kept
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name in lacks:
        said: list[str] = []
        assert checkpoint_to_resume(arguments(tmp_path), [callback], said.append) is None
        assert said[0].endswith(f"checkpoint-4 is passed over: it has no {name}")
        tensors(folder / name)
    assert checkpoint_to_resume(arguments(tmp_path), [callback]) == str(folder)


def test_low_rank_in_other_forms_has_no_factors_beside_it(tmp_path):
    config = {"quantization_config": {"quant_method": "svdinit_low_rank"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LowRankCheckpointsCallback().needs_of(tmp_path) == []
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert LowRankCheckpointsCallback().needs_of(tmp_path) == []


@pytest.mark.parametrize(
    "recipe", [train_lora, train_lori, train_full_teacher, progressive_lowrank]
)
def test_a_named_checkpoint_that_is_not_whole_is_refused_before_any_work(tmp_path, recipe):
    torn, nowhere = saved(tmp_path, 4) / "scheduler.pt", str(tmp_path / "none")
    torn.write_bytes(b"")
    options = ["--model_name_or_path", nowhere, "--use_cpu", "true", "--output_dir", nowhere]

    def refused(checkpoint: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            recipe.main([*options, "--resume_from_checkpoint", checkpoint])
        return str(exit_.value)

    named = f"error: --resume_from_checkpoint: {torn.parent} is not whole, its scheduler.pt is torn"
    assert refused(str(torn.parent)) == f"{named}; none beside it is whole"
    whole = saved(tmp_path, 2)
    assert refused(str(torn.parent)) == f"{named}; the newest whole one beside it is {whole}"
    assert "--resume_from_checkpoint must be last or the folder of" in refused(nowhere)
