"""Launchers: no silent single process, and torchrun with a file of DeepSpeed's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.every_recipe import options_of, save_inputs
from support.launching import zero3_file
from support.recipe_inputs import shared_options

from peft_svdinit.training import read_run

ROOT = Path(__file__).resolve().parents[2]


def launched(
    launcher: list[str], options: list[str], recipe: str = "train_lora"
) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", *launcher, str(ROOT / "recipes" / f"{recipe}.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_one_process_where_two_were_expected_is_refused(tmp_path):
    options = [*shared_options(tmp_path), "--max_steps", "1", "--expected_processes", "2"]
    options += ["--output_dir", str(tmp_path / "run")]
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = launched(accelerate, options)
    assert done.returncode != 0
    assert "expected_processes is 2, but 1 run" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.deepspeed
@pytest.mark.parametrize("recipe", ["train_lora", "progressive_lowrank"])
def test_torchrun_with_a_file_of_deepspeeds_own_in_which_all_weights_are_split(tmp_path, recipe):
    save_inputs(tmp_path)
    options = [*options_of(recipe, tmp_path), "--max_steps", "2", "--use_cpu", "true"]
    options += ["--output_dir", str(tmp_path / "run"), "--expected_stage", "3"]
    options += ["--deepspeed", zero3_file(tmp_path), "--total_train_batch_size", "4"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launched(torchrun, options, recipe)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "run")
    assert run.completed and run.info["runs_as"]["stage"] == 3
    file = {"train_lora": "adapter_model", "progressive_lowrank": "low_rank"}[recipe]
    saved = load_file(tmp_path / "run" / f"{file}.safetensors")
    assert saved and all(value.numel() for value in saved.values())
