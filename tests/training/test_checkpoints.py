"""Checkpoints of which a kill left a part."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from support.checkpoint_files import ALONE, archives, saved, state, tensors

from peft_svdinit.training import fault_of, newest_whole


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("note", [None, ALONE, {"processes": 3, "save_only_model": False}])
def test_a_checkpoint_lacks_nothing_until_one_of_its_files_does(tmp_path, note):
    whole = saved(tmp_path, note=note)
    assert fault_of(whole) is None
    for name in sorted({path.name for path in whole.iterdir()} - {"training_args.bin"}):
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(content[:-1])
        assert fault_of(whole) == f"its {name} is torn"
        (whole / name).unlink()
        weights = "weights, such as adapter_model.safetensors or model.safetensors"
        assert fault_of(whole) == f"it has no {weights if name.startswith('adapter') else name}"
        (whole / name).write_bytes(content)
    assert fault_of(whole) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"global_step": 4, "epo', "its trainer_state.json is torn"),
        ("[4]", "its trainer_state.json is torn"),
        ('{"global_step": "4"}', "its trainer_state.json has no global_step"),
        ('{"global_step": true}', "its trainer_state.json has no global_step"),
        ('{"global_step": 2}', "its trainer_state.json is of step 2"),
    ],
)
def test_the_state_is_that_of_the_step(tmp_path, text, fault):
    folder = saved(tmp_path)
    (folder / "trainer_state.json").write_text(text)
    assert fault_of(folder) == fault


def test_what_cannot_be_read_is_not_whole(tmp_path):
    folder = saved(tmp_path)
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").mkdir()
    assert (fault_of(folder) or "").startswith("it cannot be read (")

    def damaged(checkpoint: Path) -> list[str]:
        raise ValueError("rank_switch is missing")

    assert fault_of(saved(tmp_path, 6), damaged) == "it cannot be read (rank_switch is missing)"


def test_a_run_that_diverged_has_whole_checkpoints(tmp_path):
    folder = saved(tmp_path)
    text = '{"global_step": 4, "log_history": [{"loss": NaN, "grad_norm": Infinity}]}'
    (folder / "trainer_state.json").write_text(text)
    assert fault_of(folder) is None


def test_a_copy_by_another_name_may_be_of_any_step(tmp_path):
    assert fault_of(saved(tmp_path).rename(tmp_path / "kept")) is None


@pytest.mark.parametrize("note", [None, {"processes": 2, "save_only_model": True}])
def test_a_checkpoint_of_the_model_alone_is_whole_without_the_rest(tmp_path, note):
    folder = tmp_path / "checkpoint-4"
    tensors(folder / "adapter_model.safetensors")
    state(folder, 4, note)
    assert fault_of(folder) is None


@pytest.mark.parametrize(
    "left",
    ["rng_state_1.pth", ".x.safetensors.a1/x.safetensors", ".a.a1/adapter_model.safetensors"],
)
def test_what_an_earlier_kill_left_and_no_resume_reads_does_not_count(tmp_path, left):
    folder = saved(tmp_path)
    (folder / left).parent.mkdir(exist_ok=True)
    (folder / left).write_bytes(b"torn")
    assert fault_of(folder) is None


def test_without_a_note_the_processes_are_those_up_to_the_last_that_saved(tmp_path):
    folder = saved(tmp_path, note={"processes": 3, "save_only_model": False})
    state(folder, 4)
    assert fault_of(folder) is None
    (folder / "rng_state_1.pth").unlink()
    assert fault_of(folder) == "it has no rng_state_1.pth"


def test_an_index_has_all_its_shards(tmp_path):
    folder = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    tensors(folder / names[0])
    assert fault_of(folder) == f"it has no {names[1]}"
    tensors(folder / names[1])
    assert fault_of(folder) is None
    cut(folder / names[0])
    assert fault_of(folder) == f"its {names[0]} is torn"
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_bytes(b"")
        assert fault_of(folder) == f"its {name} is torn"


def test_deepspeed_has_the_states_of_all_processes_and_says_which_are_the_latest(tmp_path):
    folder = saved(tmp_path, note={"processes": 2, "save_only_model": False})
    for name in ("optimizer.pt", "scheduler.pt", "adapter_model.safetensors"):
        (folder / name).unlink()
    part = folder / "global_step4"
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    archives(part / names[1])
    assert fault_of(folder) == "it has no latest"
    (folder / "latest").write_text("global_step4")
    assert fault_of(folder) == "it has no global_step4/mp_rank_00_model_states.pt"
    archives(part / "mp_rank_00_model_states.pt")
    assert fault_of(folder) == f"it has no global_step4/{names[0]}"
    archives(part / names[0])
    assert fault_of(folder) is None
    cut(part / names[1])
    assert fault_of(folder) == f"its {names[1]} is torn"


def test_shards_of_fsdp_are_those_that_their_metadata_name(tmp_path):
    folder = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "optimizer.pt").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").touch()
        assert fault_of(folder) == f"it has no {name}/.metadata"
        (folder / name / ".metadata").write_bytes(pickle.dumps({"x": "__0_0.distcp"}))
    assert fault_of(folder) is None
    (folder / "optimizer_0" / "__0_0.distcp").unlink()
    assert fault_of(folder) == "it has no optimizer_0/__0_0.distcp"
    cut(folder / "optimizer_0" / ".metadata")
    assert fault_of(folder) == "its .metadata is torn"


def test_the_newest_whole_one_is_found_by_its_number_and_later_ones_told(tmp_path):
    assert newest_whole(tmp_path / "nowhere") == (None, {})
    for step in (2, 8, 10, 12):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # A deletion that was killed.
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    shutil.rmtree(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-14").touch()
    (tmp_path / "checkpoint-best").mkdir()
    told = {
        "checkpoint-12": "it has no trainer_state.json",
        "checkpoint-10": "it has no optimizer.pt",
    }
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-8", told)
    told["checkpoint-8"] = "it has no sums"
    told["checkpoint-2"] = "it has no trainer_state.json"
    assert newest_whole(tmp_path, lambda checkpoint: ["sums"]) == (None, told)
