"""`train_lora.py --init_from`: an adapter or a model as the start, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_full_teacher
import train_lora
from safetensors.torch import load_file
from support.recipe_inputs import save_model, shared_options
from support.tiny_models import rewrite_tensors

from peft_svdinit.training import read_run

TEACHER_STEPS = 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Path, list[str]]:
    """A LoRA of rank 2 on two kinds of layers with its moments and a checkpoint; its options."""
    folder = tmp_path_factory.mktemp("teacher")
    options = shared_options(folder)
    own = ["--lora_target_modules", "q_proj", "down_proj", "--max_steps", str(TEACHER_STEPS)]
    own += ["--output_dir", str(folder / "run"), "--save_steps", "3", "--save_moments", "true"]
    train_lora.main([*options, *own])
    return folder, [*options, "--init_from", str(folder / "run"), "--max_steps", "2"]


def student(options: list[str], output: Path, rank: int, *more: str) -> Any:
    """The record of a run from the teacher."""
    train_lora.main([*options, "--output_dir", str(output), "--lora_r", str(rank), *more])
    return read_run(output)


def moment_steps(run: Path) -> set[float]:
    moments = load_file(run / "adam_moments.safetensors")
    return {value.item() for key, value in moments.items() if key.endswith(".step")}


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_start_at_any_rank_says_what_it_holds_and_goes_on_with_adams_moments(
    teacher, tmp_path, capsys, rank
):
    folder, options = teacher
    more = ("--save_moments", "true", "--eval_on_start", "true")
    run = student(options, tmp_path, rank, *more)
    start, output = run.info["extra"]["start"], capsys.readouterr().out
    begun, ended = run.log[0]["eval_loss"], read_run(folder / "run").final_eval_loss
    share = "of its energy; worst layer model.layers." if rank == 1 else "holds all of its energy\n"
    assert f"start: the delta of {folder / 'run'} at rank {rank} holds " in output
    assert share in output and f"moments of {folder / 'run'}, 6 steps old" in output
    assert start["kind"] == "adapter" and start["layers"] == 4 and start["rank"] == rank
    assert (start["energy"] < 0.9999) == (rank == 1)
    assert rank == 1 or begun == pytest.approx(ended, abs=1e-5)
    assert moment_steps(tmp_path) == {TEACHER_STEPS + 2}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == rank and set(saved["target_modules"]) == {"q_proj", "down_proj"}


def test_a_checkpoint_gives_the_moments_of_its_optimizer(teacher, tmp_path, capsys):
    """The last one's are those that the run wrote when it ended: equal runs, bit by bit."""
    folder, options = teacher
    checkpoint = folder / "run" / f"checkpoint-{TEACHER_STEPS}"
    assert (checkpoint / "optimizer.pt").is_file()
    first = student(options, tmp_path / "a", 2)
    second = student([*options, "--init_from", str(checkpoint)], tmp_path / "b", 2)
    assert f"moments of {checkpoint}, 6 steps old" in capsys.readouterr().out
    assert first.final_eval_loss == second.final_eval_loss


@pytest.mark.parametrize("what", ["none", "of another adapter", "truncated", "sgd"])
def test_without_moments_adam_starts_fresh_and_says_so(teacher, tmp_path, capsys, what):
    folder, options = teacher
    adapter, more = tmp_path / "adapter", []
    shutil.copytree(folder / "run", adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    if what == "none":
        (adapter / "adam_moments.safetensors").unlink()
    elif what == "of another adapter":
        rewrite_tensors(adapter / "adam_moments.safetensors", lambda tensors: tensors.clear())
    elif what == "truncated":
        moments = adapter / "adam_moments.safetensors"
        moments.write_bytes(moments.read_bytes()[:-8])
    else:
        more = ["--optim", "sgd"]
    student([*options, "--init_from", str(adapter), *more], tmp_path / "run", 2)
    output = capsys.readouterr().out
    assert f"the moments of {adapter} are not carried: " in output
    assert ("Adam starts fresh" in output) == (what != "sgd")
    assert ("carried: SGD keeps none" in output) == (what == "sgd")


def test_a_resumed_run_has_the_same_start_and_a_changed_adapter_is_noticed(
    teacher, tmp_path, capsys
):
    folder, options = teacher
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    shutil.copytree(folder / "run", adapter)
    own = [*options, "--init_from", str(adapter), "--save_steps", "1"]
    resume = ["--resume_from_checkpoint", "last"]
    begun = student(own, run, 3).info["extra"]["start"]
    made = (run / "start" / "factors.safetensors").stat().st_mtime_ns
    (adapter / "training_log.csv").unlink()  # No part of what is read.
    copied = adapter / "adapter_model.safetensors"
    os.utime(copied, (0, 0))  # As a copy of the same bytes.
    resumed = student(own, run, 3, "--max_steps", "3", *resume)
    assert (run / "start" / "factors.safetensors").stat().st_mtime_ns == made
    assert resumed.info["extra"]["start"] == begun and resumed.info["steps"] == 3

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key] = 2 * tensors[key]

    adapter.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    student(own, run, 3, "--max_steps", "3", *resume)
    assert f"{adapter} cannot be read any more" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(adapter)
    rewrite_tensors(adapter / "adapter_model.safetensors", edit)
    with pytest.raises(
        SystemExit, match=r"--init_from: .* began at .*--lora_target_modules \w+_proj"
    ):
        student(own, run, 3, "--max_steps", "4", *resume)
    student(own, run, 3)
    assert (run / "start" / "factors.safetensors").stat().st_mtime_ns != made


def test_a_fine_tuned_model_is_a_start_too(teacher, tmp_path, capsys):
    _, options = teacher
    first = options.index("--lora_r")
    tuned = tmp_path / "tuned"
    train_full_teacher.main([*options[:first], "--max_steps", "2", "--output_dir", str(tuned)])
    run = student([*options, "--init_from", str(tuned)], tmp_path / "run", 8)
    start, output = run.info["extra"]["start"], capsys.readouterr().out
    assert start["kind"] == "model" and start["layers"] == 14 and 0.5 < start["energy"] <= 1
    assert "moments" not in output


def test_a_base_in_four_bits_works(teacher, tmp_path):
    pytest.importorskip("bitsandbytes")
    _, options = teacher
    # Evaluation on a CPU with AVX512-BF16 repacks weights, which needs 32 rows.
    more = ("--load_in_4bit", "true", "--eval_strategy", "no", "--eval_on_start", "false")
    assert student(options, tmp_path, 3, *more).completed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--init", "svd"], "--init_from is a start of its own.*leave out --init=svd"),
        (["--svd_factors", "x"], "leave out --svd_factors=x"),
        (["--svd_source", "weight"], "leave out --svd_source=weight"),
        (["--svd_start", "subspace"], "leave out --svd_start=subspace"),
        (["--carry_moments_from", "x"], "leave out --carry_moments_from=x"),
        (["--svd_part", "minor"], "leave out --svd_part=minor"),
        (["--init_from", ""], "--init_from.* must not be empty"),
        (["--output_dir", "{model}", "--init_from", "{model}"], "would overwrite it"),
        (["--init_from", "/nowhere"], "^error: --init_from: /nowhere is not a folder"),
        (["--init_from", "{model}/.."], "^error: --init_from: .* holds data.jsonl, model, run"),
        (["--lora_r", "17"], r"^error: --lora_r=17 is above the (8|16) triplets"),
        (
            ["--lora_target_modules", "q_proj", "v_proj"],
            r"^error: --init_from and --lora_target_modules differ: 2 target layers .*v_proj.*"
            r"2 layers of its delta without .*down_proj.*change --lora_target_modules",
        ),
    ],
)
def test_what_contradicts_is_refused_in_one_line(teacher, tmp_path, capsys, extra, message):
    folder, options = teacher
    typed = [one.format(model=folder / "model") for one in extra]
    with pytest.raises(SystemExit) as stopped:
        train_lora.main([*options, "--output_dir", str(tmp_path), *typed])
    said = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value.code)
    assert re.search(message, said), said


def test_an_adapter_of_another_base_is_refused_unless_it_is_meant(teacher, tmp_path):
    _, options = teacher
    other = [*options, "--model_name_or_path", str(save_model(tmp_path / "model", seed=3))]
    with pytest.raises(SystemExit, match=r"this one is .*weights differ.*--check_base=False"):
        student(other, tmp_path / "run", 2)
    assert student(other, tmp_path / "run", 2, "--check_base", "false").completed
