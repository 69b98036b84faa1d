"""The training recipes, run as a user runs them on a tiny model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys

import compare_inits
import continual
import pytest
import torch
import train_full_teacher
import train_lora
import train_lori
from safetensors.torch import load_file
from support.recipe_inputs import shared_options

from peft_svdinit.cli import main as svdinit
from peft_svdinit.training import read_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained random-init LoRA with its moments, and the options that made it."""
    folder = tmp_path_factory.mktemp("teacher")
    options = [*shared_options(folder), "--max_steps", "6"]
    output = folder / "random"
    train_lora.main([*options, "--output_dir", str(output), "--save_moments", "true"])
    svdinit(
        f"synthesize --adapter {output} --base {folder}/model --rank 4 --lora_r 2 --plots false "
        f"--output_dir {folder}/factors".split()
    )
    return folder, options


def losses(folder) -> list[tuple]:
    return [(row["step"], row["loss"], row["eval_loss"]) for row in read_run(folder).log]


def test_a_run_leaves_an_adapter_and_a_completed_record(teacher):
    folder, _ = teacher
    run = read_run(folder / "random")
    assert run.completed and run.info["steps"] == 6 and run.info["tokens"] > 0
    assert run.log[0]["step"] == 0 and run.log[0]["eval_loss"] is not None
    assert run.log[-1]["step"] == 6 and run.log[-1]["eval_loss"] is not None
    assert json.loads((folder / "random/adapter_config.json").read_text())["r"] == 2


def test_the_svd_start_begins_where_the_teacher_ended(teacher, tmp_path):
    folder, options = teacher
    svd = ["--init", "svd", "--svd_factors", str(folder / "factors")]
    train_lora.main([*options, *svd, "--output_dir", str(tmp_path / "svd"), "--max_steps", "1"])
    begun = read_run(tmp_path / "svd").log[0]["eval_loss"]
    ended = read_run(folder / "random").final_eval_loss
    assert begun == pytest.approx(ended, abs=1e-5)


def test_carried_moments_are_those_of_the_teacher_and_change_the_course(teacher, tmp_path):
    folder, options = teacher
    svd = ["--init", "svd", "--svd_factors", str(folder / "factors"), "--max_steps", "2"]
    carry = ["--carry_moments_from", str(folder / "random"), "--save_moments", "true"]
    train_lora.main([*options, *svd, "--output_dir", str(tmp_path / "fresh")])
    train_lora.main([*options, *svd, *carry, "--output_dir", str(tmp_path / "carried")])
    fresh, carried = read_run(tmp_path / "fresh"), read_run(tmp_path / "carried")
    assert fresh.log[0]["eval_loss"] == carried.log[0]["eval_loss"]
    assert fresh.final_eval_loss != carried.final_eval_loss
    moments = load_file(tmp_path / "carried" / "adam_moments.safetensors")
    steps = {value.item() for key, value in moments.items() if key.endswith(".step")}
    assert steps == {8.0}


def test_two_runs_with_one_seed_are_equal_bit_by_bit(teacher, tmp_path):
    folder, options = teacher
    train_lora.main([*options, "--output_dir", str(tmp_path / "again")])
    assert losses(tmp_path / "again") == losses(folder / "random")
    first = load_file(folder / "random" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def killed_when_it_opens(file: str, options: list[str]) -> None:
    """A run in a process of its own, ended by a kill when it opens a file to write it."""

    def run() -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event == "open" and str(arguments[0]).endswith(file) and arguments[1] == "w":
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        train_lora.main(options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_that_is_killed_whenever_it_saves_ends_as_one_that_is_not(teacher, tmp_path):
    folder, options = teacher
    run = tmp_path / "run"
    again = [*options, "--output_dir", str(run), "--save_steps", "2"]
    again += ["--resume_from_checkpoint", "last"]
    killed_when_it_opens("checkpoint-2/trainer_state.json", again)
    killed_when_it_opens("checkpoint-4/trainer_state.json", again)
    assert not read_run(run).completed
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    killed_when_it_opens("run/adapter_config.json", again)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    train_lora.main(again)
    assert losses(run) == losses(folder / "random")
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (folder / "random" / name).read_bytes()


def test_a_full_teacher_is_extracted_and_starts_a_student(teacher, tmp_path):
    folder, options = teacher
    lora = options.index("--lora_r")
    train_full_teacher.main([*options[:lora], "--max_steps", "3", "--output_dir", f"{tmp_path}/t"])
    svdinit(
        f"extract --base {folder}/model --tuned {tmp_path}/t --save_as factors --rank 8 "
        f"--lora_r 8 --plots false --output_dir {tmp_path}/factors".split()
    )
    report = json.loads((tmp_path / "factors" / "svd_analysis_rank8.json").read_text())
    assert "model.embed_tokens.weight" in report["source"]["uncovered"]
    svd = ["--init", "svd", "--svd_factors", f"{tmp_path}/factors", "--output_dir", f"{tmp_path}/s"]
    train_lora.main([*options, *svd, "--max_steps", "1"])
    assert read_run(tmp_path / "s").completed


@pytest.mark.parametrize("start", ["delta", "reference"])
def test_a_start_from_gradients_is_resumed_from_its_saved_factors(teacher, tmp_path, start):
    _, options = teacher
    out = tmp_path / "run"
    run = [*options, "--init", "svd", "--svd_source", "gradient", "--svd_start", start]
    run += ["--output_dir", str(out), "--save_steps", "2", "--resume_from_checkpoint", "last"]
    train_lora.main([*run, "--max_steps", "2"])
    file = out / "start" / "factors.safetensors"
    made = file.stat().st_mtime_ns
    cost = read_run(out).info["extra"]["start"]
    train_lora.main([*run, "--max_steps", "4"])
    assert file.stat().st_mtime_ns == made
    assert read_run(out).info["extra"]["start"] == cost and cost["tokens"] > 0
    assert read_run(out).info["steps"] == 4
    sidecar = json.loads((out / "svdinit_config.json").read_text())
    assert sidecar["svd_factors"] == str(out / "start")


def test_factors_of_other_options_in_the_folder_are_made_again(teacher, tmp_path):
    _, options = teacher
    run = [*options, "--init", "svd", "--svd_source", "activation", "--svd_start", "subspace"]
    run += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    train_lora.main(run)
    first = (tmp_path / "run" / "start" / "factors.safetensors").read_bytes()
    train_lora.main([*run, "--init_batches", "1"])
    assert (tmp_path / "run" / "start" / "factors.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--init", "svd"], "needs --svd_factors"),
        (["--svd_source", "weight"], "need --init=svd"),
        (["--init", "svd", "--svd_source", "noise"], "svd_source must be one of teacher"),
        (["--init", "svd", "--svd_source", "weight"], "would add a part of each weight"),
        (
            ["--init", "svd", "--svd_source", "weight", "--svd_factors", "x"],
            "need --svd_source=teach",
        ),
        (["--init", "svd", "--svd_source", "activation"], "svd_start=delta has no meaning"),
        (
            ["--init", "svd", "--svd_source", "gradient", "--svd_part", "minor"],
            "svd_part=minor needs",
        ),
        (
            ["--init", "svd", "--svd_source", "gradient", "--gradient_form", "odd"],
            "gradient_form must be one of orthogonalised, plain",
        ),
        (
            ["--init", "svd", "--svd_source", "gradient", "--init_batches", "0"],
            "init_batches must be at least 1",
        ),
        (["--svd_factors", "x"], "need --init=svd"),
        (["--lora_r", "0"], "must be positive"),
        (["--lora_rank", "4"], "unknown option --lora_rank"),
        (["--expected_processes", "2"], "expected_processes is 2, but 1 run"),
    ],
)
def test_contradictory_options_are_refused_in_one_line(teacher, extra, message, capsys):
    _, options = teacher
    with pytest.raises(SystemExit) as exit_:
        train_lora.main([*options, *extra])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (train_full_teacher, ["--model_name_or_path"]),
        (train_full_teacher, ["--dataset_name"]),
        (train_lora, ["--model_name_or_path"]),
        (train_lora, ["--init", "svd", "--svd_factors"]),
        (train_lori, ["--model_name_or_path"]),
        (train_lori, ["--lori_start"]),
        (train_lori, ["--exclude_masks"]),
        (train_lori, ["--mask_source", "teacher", "--svd_factors"]),
        (compare_inits, ["--model_name_or_path"]),
        (compare_inits, ["--teacher_adapter"]),
        (compare_inits, ["--teacher_model"]),
        (continual, ["--model_name_or_path"]),
    ],
)
def test_a_missing_path_is_refused_by_the_option_that_was_typed(teacher, recipe, options, tmp_path):
    base = teacher[1][teacher[1].index("--model_name_or_path") + 1]
    missing = str(tmp_path / "missing.json")
    model = [] if "--model_name_or_path" in options else ["--model_name_or_path", base]
    rest = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=f"^error: {options[-1]}\\b"):
        recipe.main([*model, *rest, *options, missing])
