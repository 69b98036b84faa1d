"""Recipes under every launch file that runs without a GPU, as the table of the README says."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.every_recipe import EVERY, save_inputs

from peft_svdinit.training import read_run

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "recipes" / "accelerate"
DEEPSPEED = [path.stem for path in sorted(FILES.glob("zero*.yaml"))]
TESTED = [path.stem for path in sorted(FILES.glob("*.yaml")) if path.stem != "fsdp2"]
# As the file says; all others in float32, so that losses can be compared.
IN_BFLOAT16 = ("single_gpu", "zero3_offload")
# The others run the two that train adapters, and all of them with --thorough.
WITH_EVERY = ("cpu", "ddp", "zero3")
# Of these, the stages and the host's optimizer are those of others.
THOROUGH = ("single_gpu", "zero1", "zero2_offload", "zero3_offload")

pytestmark = pytest.mark.slow


def documented(name: str) -> list[str]:
    """The options of a recipe in the command at the head of a launch file."""
    text = (FILES / f"{name}.yaml").read_text(encoding="utf-8")
    command = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#"))
    return re.findall(r"--expected_\w+ \S+", command)


def launched(name: str, script: Path, options: list[str], **launcher: Any) -> list[str]:
    """What the processes of all machines said; fails with the first that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port]
    command += ["--config_file", str(FILES / f"{name}.yaml")]
    if name not in IN_BFLOAT16:
        command += ["--mixed_precision", "no"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
    }
    machines = [[]]
    if name == "multi_node":
        machines = [["--main_process_ip", "127.0.0.1", "--num_processes", "2"] for _ in range(2)]
        for rank, machine in enumerate(machines):
            machine += ["--machine_rank", str(rank)]
    running = [
        subprocess.Popen(
            [*command, *machine, str(script), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in machines
    ]
    try:
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda each: each.communicate(timeout=600)[0], running))
    finally:
        for each in running:
            each.kill()
    for each, text in zip(running, said, strict=True):
        assert each.returncode == 0, text
    return said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


def run_recipes(name: str, inputs: Path, outputs: Path, recipes: list[str]) -> str:
    """All that the processes said."""
    expected = " ".join(documented(name)).split()
    if name == "multi_node":
        expected[expected.index("--expected_processes") + 1] = "2"
    options = [str(inputs), str(outputs), ",".join(recipes), "--use_cpu", "true", *expected]
    return "".join(launched(name, ROOT / "tests" / "support" / "every_recipe.py", options))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs) -> Path:
    """What one process leaves, with the batch of several."""
    folder = tmp_path_factory.mktemp("alone")
    run_recipes("cpu", inputs, folder, ["train_lora", "train_lori"])
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_run(folder).log if row["loss"] is not None]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def ranks_of(folder: Path) -> dict[str, int]:
    """Ranks of the layers as they are in the adapter, which must be those of the budget."""
    stored = json.loads((folder / "start" / "ranks.json").read_text())["ranks"]
    found = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(value)
        for key, value in adapter(folder).items()
        if ".lora_A." in key
    }
    assert found == stored
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.deepspeed] * (n in DEEPSPEED)) for n in TESTED],
)
def test_recipes_run_as_the_launch_file_says(name, inputs, alone, tmp_path, request):
    every = name in WITH_EVERY or request.config.getoption("--thorough")
    if name in THOROUGH and not request.config.getoption("--thorough"):
        pytest.skip("with --thorough")
    recipes = EVERY if every else ["train_lora", "train_lori"]
    outputs, said = tmp_path, run_recipes(name, inputs, tmp_path, recipes)
    # Of several processes the first one finds the ranks and says what all are.
    assert said.count("rank_budget: ") == 1 and said.count("runs as: ") >= 1
    assert said.count("goes on from checkpoint-5; checkpoint-10 is passed over: it has no rng") == 1
    options = dict(option.removeprefix("--expected_").split() for option in documented(name))
    for recipe in recipes:
        records = [json.loads(path.read_text()) for path in (outputs / recipe).rglob("run.json")]
        assert records and all(record["status"] == "completed" for record in records), recipe
        for runs_as in (record["runs_as"] for record in records):
            precision = "bf16" if name in IN_BFLOAT16 else "no"
            assert runs_as["mixed_precision"] == precision, recipe
            assert runs_as["wrapper"] == options["wrapper"], recipe
            assert runs_as["stage"] == int(options.get("stage", 0)), recipe
            assert bool(runs_as["offloaded"]) == ("offload" in name), recipe
    whole, resumed = adapter(outputs / "train_lora"), adapter(outputs / "killed")
    difference = max((resumed[key].float() - whole[key].float()).abs().max() for key in whole)
    # DeepSpeed's Adam on the host counts the powers of its betas from another step.
    assert difference <= (0.004 if name in IN_BFLOAT16 else 1e-6) * ("offload" in name)
    ranks = [ranks_of(folder / "budget") for folder in (alone, outputs)]
    assert len(set(ranks[0].values())) > 1 and (name in IN_BFLOAT16 or ranks[0] == ranks[1])
    for recipe in ("train_lora", "train_lori"):
        expected, found = adapter(alone / recipe), adapter(outputs / recipe)
        assert found.keys() == expected.keys()
        if name not in IN_BFLOAT16:
            assert losses(outputs / recipe) == pytest.approx(losses(alone / recipe), abs=1e-3)
            assert max((found[key] - expected[key]).abs().max() for key in found) < 1e-5


def test_fsdp_that_runs_as_ddp_is_refused(inputs, tmp_path):
    options = ["--model_name_or_path", str(inputs / "model"), "--use_cpu", "true"]
    options += ["--dataset_name", str(inputs / "data.jsonl"), "--max_steps", "1"]
    options += ["--output_dir", str(tmp_path), *" ".join(documented("fsdp2")).split()]
    with pytest.raises(AssertionError) as failed:
        launched("fsdp2", ROOT / "recipes" / "train_lora.py", options)
    assert "error: --expected_wrapper is FSDPModule, but the training runs as 2" in str(
        failed.value
    )
    assert not list(tmp_path.glob("adapter*"))
