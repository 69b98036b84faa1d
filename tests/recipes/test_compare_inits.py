"""The pipeline from a teacher to a report, whole, by step, killed, and on wrong inputs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import compare_inits
import pytest
import train_lora
from stages import comparison_plan
from stages.starts import CELLS
from support.recipe_inputs import save_dataset, save_model, shared_options

from peft_svdinit.training import read_run
from trainer_callbacks import adam_moments, comparison

QUICK = ["--max_steps", "2", "--teacher_steps", "2", "--teacher_rank", "4", "--eval_steps", "1"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A whole comparison of two seeds, and its options."""
    folder = tmp_path_factory.mktemp("compared")
    options = [*shared_options(folder), *QUICK, "--seeds", "0", "1", "--carry_moments", "true"]
    options += ["--output_dir", str(folder / "out")]
    compare_inits.main(options)
    return folder, options


def records(folder: Path) -> dict[str, dict]:
    return {
        path.name.rpartition("-")[0]: read_run(path).info
        for path in sorted((folder / "out" / "runs").iterdir())
        if (path / "run.json").is_file()
    }


@pytest.mark.parametrize(
    ("owner", "writer", "missing"),
    [
        (adam_moments, "save_moments", "adam_moments.safetensors"),
        (comparison, "write_run_info", "complete record"),
    ],
)
def test_a_teacher_that_left_something_out_stops_the_pipeline_until_it_is_there(
    tmp_path, monkeypatch, owner, writer, missing
):
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--carry_moments", "true"]
    options += ["--output_dir", str(tmp_path / "out"), "--only", "train_random"]
    original = getattr(owner, writer)

    def full(*args):
        if isinstance(args[1], dict) and args[1]["status"] == "running":
            return original(*args)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, writer, full)
        with pytest.raises(SystemExit, match=f"teacher-seed0-.* left no {missing}: mend"):
            compare_inits.main(options)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert (folder / "adapter_model.safetensors").is_file()
    compare_inits.main(options)
    assert (folder / "adam_moments.safetensors").is_file()
    assert read_run(folder).completed


def test_the_report_stands_with_all_methods_and_seeds(compared):
    folder, _ = compared
    out = folder / "out"
    for name in ("comparison_report.md", "comparison.html", "comparison.json", "loss_curves.png"):
        assert (out / name).stat().st_size > 0
    numbers = json.loads((out / "comparison.json").read_text())
    methods = {method["method"]: method for method in numbers["methods"]}
    assert set(methods) == {
        "random", "random_total", "svd_delta", "svd_subspace", "svd_delta_moments", "pissa_niter_4",
    }  # fmt: skip
    assert "no full fine-tune" in (out / "comparison_report.md").read_text()


def test_budgets_are_equal_in_tokens_and_in_the_examples_seen(compared):
    found = records(compared[0])
    for seed in (0, 1):
        tokens = {name: info["tokens"] for name, info in found.items() if f"seed{seed}" in name}
        student = tokens[f"random-seed{seed}"]
        assert tokens[f"svd_delta-seed{seed}"] == tokens[f"svd_subspace-seed{seed}"] == student
        assert tokens[f"random_total-seed{seed}"] == student + tokens[f"teacher-seed{seed}"]
        about = found[f"svd_delta-seed{seed}"]["extra"]["comparison"]
        assert about["teacher"]["tokens"] == tokens[f"teacher-seed{seed}"]


def test_the_delta_student_begins_at_its_teacher_and_the_subspace_one_at_the_base(compared):
    runs = {
        path.name.rpartition("-")[0]: read_run(path)
        for path in (compared[0] / "out" / "runs").iterdir()
        if (path / "run.json").is_file()
    }
    first = {name: run.log[0].get("eval_loss") for name, run in runs.items()}
    # The first steps of the random run of the total budget are those of the teacher.
    (taught,) = (
        row["eval_loss"]
        for row in runs["random_total-seed0"].log
        if row["step"] == 2 and row["eval_loss"] is not None
    )
    assert first["svd_delta-seed0"] == pytest.approx(taught, abs=1e-5)
    assert first["svd_subspace-seed0"] == pytest.approx(first["random-seed0"], abs=1e-5)


def test_the_same_command_again_trains_nothing(compared, monkeypatch, capsys):
    monkeypatch.setattr(comparison_plan, "train_lora", lambda *a, **k: pytest.fail("trained again"))
    compare_inits.main(compared[1])
    assert capsys.readouterr().out.count("done before") == 2 * 8


@pytest.mark.thorough
def test_a_new_seed_trains_only_its_own_runs(compared, capsys):
    folder, options = compared
    shutil.copytree(folder / "out", folder / "more")
    changed = [str(folder / "more") if part == str(folder / "out") else part for part in options]
    changed[changed.index("--seeds") + 2] = "2"
    compare_inits.main(changed)
    printed = capsys.readouterr().out
    assert printed.count("done before") == 8 and "svd_delta-seed2 (time left" in printed


def test_a_kill_in_a_student_restarts_there(tmp_path, monkeypatch, capsys):
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--output_dir", f"{tmp_path}/out"]

    def killed(materials, model, lora, *args, **kwargs):
        if lora.init == "svd":
            raise KeyboardInterrupt
        return train_lora.train_lora(materials, model, lora, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(comparison_plan, "train_lora", killed)
        with pytest.raises(KeyboardInterrupt):
            compare_inits.main(options)
    assert not (tmp_path / "out" / "comparison.html").exists()
    compare_inits.main(options)
    assert capsys.readouterr().out.count("done before") == 4
    assert (tmp_path / "out" / "comparison.html").exists()


@pytest.mark.thorough
def test_steps_run_one_by_one_and_refuse_to_jump(tmp_path):
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--output_dir", f"{tmp_path}/out"]
    with pytest.raises(SystemExit, match="run that step first"):
        compare_inits.main([*options, "--only", "train_svd"])
    for step in ("train_random", "2", "train_svd"):
        compare_inits.main([*options, "--only", step])
    assert not (tmp_path / "out" / "comparison.html").exists()
    compare_inits.main([*options, "--from_step", "compare"])
    assert (tmp_path / "out" / "comparison.html").exists()


def test_a_full_teacher_and_a_learning_rate_sweep(tmp_path):
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--output_dir", f"{tmp_path}/out"]
    options += ["--teacher", "full", "--starts", "delta", "--sweep_lr"]
    compare_inits.main([*options, "0.001", "0.01"])
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {sweep["method"] for sweep in numbers["sweeps"]} == {
        "random", "random_total", "svd_delta", "pissa_niter_4",
    }  # fmt: skip
    report = (tmp_path / "out" / "comparison_report.md").read_text()
    assert "full fine-tune" in report and "0.001" in report


def test_cells_of_the_grid_need_no_teacher_and_state_what_their_batches_cost(tmp_path, capsys):
    cells = [name for name, cell in CELLS.items() if not cell.taught]
    assert len(cells) == 11
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--output_dir", f"{tmp_path}/out"]
    options += ["--peft_inits", "pissa", "--init_batches", "2", "--starts", *cells]
    compare_inits.main(options)
    printed = capsys.readouterr().out
    runs = {
        path.name.rpartition("-")[0]: read_run(path)
        for path in (tmp_path / "out" / "runs").iterdir()
    }
    assert {(run.comparison or {})["method"] for run in runs.values()} == {
        "random", "pissa", *(CELLS[name].method for name in cells),
    }  # fmt: skip
    begun = {name: run.log[0]["eval_loss"] for name, run in runs.items()}
    for name, cell in CELLS.items():
        if name in cells and cell.options["svd_start"] != "delta":
            assert begun[f"{cell.method}-seed0"] == pytest.approx(begun["random-seed0"], abs=1e-4)
    assert begun["gradient_delta-seed0"] < begun["random-seed0"]
    assert begun["gradient_plain_delta-seed0"] < begun["random-seed0"]
    # The published cell is PEFT's own up to where the frozen part lives.
    ours, theirs = (runs[f"{name}-seed0"] for name in ("weight_principal_reference", "pissa"))
    assert ours.final_eval_loss == pytest.approx(theirs.final_eval_loss, abs=1e-4)
    cost = runs["gradient_delta-seed0"].info["extra"]["start"]
    assert cost["source"] == "gradient" and cost["batches"] >= 1 + 3
    assert cost["tokens"] > 0 and cost["seconds"] > 0
    assert runs["activation_subspace-seed0"].info["extra"]["start"]["batches"] == 2
    assert "start" not in runs["weight_minor_reference-seed0"].info["extra"]
    assert "before the first step, on top of the run" in printed


def test_an_existing_teacher_is_compared_with_its_cost_as_sunk(compared, tmp_path):
    folder, options = compared
    adapter = next((folder / "out" / "runs").glob("teacher-seed0-*"))
    changed = [*options, "--output_dir", str(tmp_path / "out"), "--carry_moments", "false"]
    compare_inits.main([*changed, "--teacher_adapter", str(adapter), "--teacher_rank", "2"])
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "random_total" not in {method["method"] for method in numbers["methods"]}
    assert "sunk" in (tmp_path / "out" / "comparison_report.md").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--teacher", "half"], "teacher must be .*lora.*full"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--starts", "middle"], "starts must be of"),
        (["--starts", "weight-principal:delta"], "starts must be of"),
        (
            ["--starts", "gradient:subspace", "--teacher_adapter", "x/y/z"],
            "of no use to --starts",
        ),
        (["--lora_r", "8"], "above --teacher_rank=4"),
        (["--init", "pissa"], "set by the comparison"),
        (["--init_from", "x"], "set by the comparison"),
        (["--seed", "7"], "use seeds"),
        (["--noise_share", "1"], r"noise_share must be in \[0, 1\)"),
        (["--teacher_adapter", "missing/folder/x"], "not a folder"),
        (["--lora_target_modules", "nothing"], "matches no linear layer"),
        (["--prompt_column", "question", "--text_column", "t"], "needs question and completion"),
        (["--only", "5"], "only must be one of"),
        (["--teacher", "full", "--carry_moments", "true"], "carry_moments needs a LoRA teacher"),
    ],
)
def test_wrong_inputs_are_refused_before_any_training(tmp_path, extra, message, capsys):
    options = [*shared_options(tmp_path), *QUICK, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_:
        compare_inits.main([*options, *extra])
    said = capsys.readouterr().err + str(exit_.value)
    assert re.search(message, said), said
    assert not (tmp_path / "out" / "runs").exists()


def test_an_unwritable_output_is_refused(tmp_path):
    (tmp_path / "file").touch()
    options = [*shared_options(tmp_path), *QUICK, "--output_dir", str(tmp_path / "file")]
    with pytest.raises((SystemExit, FileExistsError, NotADirectoryError)):
        compare_inits.main(options)


@pytest.mark.thorough
def test_a_changed_model_is_another_input(tmp_path, capsys):
    options = [*shared_options(tmp_path), *QUICK, "--seeds", "0", "--output_dir", f"{tmp_path}/out"]
    first = ["--only", "train_random"]
    compare_inits.main([*options, *first])
    save_model(tmp_path / "model", seed=1)
    save_dataset(tmp_path / "data.jsonl")
    compare_inits.main([*options, *first])
    assert "done before" not in capsys.readouterr().out
