"""The LoRI recipe: whole runs from every mask source, killed at every stage, changed, misused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_lori
from stages import lori_stages
from stages.lori_options import LoriArguments
from support.recipe_inputs import shared_options

from peft_svdinit import FactorsMetadata, save_factors
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.masks import Selection, load_compact, load_mask, load_scores, select
from peft_svdinit.training import Task, read_run
from trainer_callbacks import lori_calibration
from trainer_callbacks.comparison import ComparisonCallback

QUICK = ["--max_steps", "4", "--calibration_steps", "3", "--lori_density", "0.25"]
QUICK += ["--lora_target_modules", "q_proj", "v_proj", "down_proj", "--save_steps", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole run, and the options that made it."""
    folder = tmp_path_factory.mktemp("lori")
    options = [*shared_options(folder), *QUICK]
    train_lori.main([*options, "--output_dir", str(folder / "run")])
    return folder / "run", options


def stage(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"{name}-*")
    return found


def test_a_calibration_without_scores_stops_the_recipe_and_goes_on_once_there_is_room(
    made, tmp_path, monkeypatch
):
    folder, options = made

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lori_calibration, "save_scores", full)
        with pytest.raises(SystemExit, match=r"calibration-.* left no lori_scores"):
            train_lori.main([*options, "--output_dir", str(tmp_path / "run")])
    calibration = stage(tmp_path / "run", "calibration")
    assert (calibration / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "run").glob("mask-*"))
    # Two, of which one has its sums of gradients at any time.
    kept = {each.name for each in calibration.glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3"}
    train_lori.main([*options, "--output_dir", str(tmp_path / "run")])
    assert same(tmp_path / "run", folder)


def uncalibrated(options: list[str]) -> list[str]:
    """The options without those of the calibration."""
    at = options.index("--calibration_steps")
    return [*options[:at], *options[at + 2 :]]


def weights(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    adapter = LoraAdapter(folder)
    return {name: (adapter[name].lora_A, adapter[name].lora_B) for name in adapter}


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["eval_loss"]) for row in read_run(folder).log]


def test_a_run_leaves_stock_adapter_mask_compact_file_and_record(made):
    folder, _ = made
    mask, compact, run = load_mask(folder), load_compact(folder), read_run(folder)
    assert run.completed and run.log[0]["step"] == 0 and run.log[-1]["step"] == 4
    assert run.final_eval_loss is not None
    assert mask.kept == round(0.25 * mask.size) == run.info["trainable_parameters"]
    assert run.info["extra"]["lori"]["trained"] == mask.kept
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    for name, (_, lora_B) in weights(folder).items():
        entries = compact.mask.layers[name].mask
        assert torch.equal(lora_B[entries].bfloat16(), compact.values[name])
        assert not lora_B[~mask.layers[name].mask].any()


def test_the_mask_is_that_of_the_calibrated_magnitudes_over_the_same_A(made):
    folder, _ = made
    calibrated, trained = weights(stage(folder, "calibration")), weights(folder)
    magnitudes = {name: lora_B.abs() for name, (_, lora_B) in calibrated.items()}
    expected = select(magnitudes, Selection(0.25, floor=0.025))
    masks = load_mask(folder).masks
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert all(torch.equal(calibrated[name][0], trained[name][0]) for name in calibrated)


class Killed(Exception):
    pass


def killed_at(monkeypatch, owner, method: str, when) -> None:
    """Let `method` raise Killed the first time that `when` says so."""
    original = getattr(owner, method)

    def dies(*args, **kwargs):
        if when(*args, **kwargs):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, dies)


def at_step(step: int, steps: int):
    """True before step `step` of a training of so many `steps`."""
    return lambda self, args, state, control, **kwargs: (
        state.global_step == step - 1 and state.max_steps == steps
    )


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param("calibration", marks=pytest.mark.thorough),
        "mask",
        "training",
        pytest.param("ending", marks=pytest.mark.thorough),
    ],
)
def test_a_run_killed_at_any_stage_ends_as_one_that_was_not(made, tmp_path, monkeypatch, killed):
    whole, options = made
    again = [*options, "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        if killed == "calibration":
            killed_at(patch, ComparisonCallback, "on_step_begin", at_step(3, 3))
        elif killed == "training":
            killed_at(patch, ComparisonCallback, "on_step_begin", at_step(4, 4))
        elif killed == "mask":
            killed_at(patch, train_lori, "prepare_folder", lambda *args: True)
        else:
            killed_at(patch, train_lori, "compact_adapter_folder", lambda *args: True)
        with pytest.raises(Killed):
            train_lori.main(again)
    checkpoints = sorted(tmp_path.glob("run/calibration-*/checkpoint-2"))
    assert len(checkpoints) == (killed == "calibration")
    train_lori.main(again)
    assert same(tmp_path / "run", whole)
    assert losses(tmp_path / "run") == losses(whole)
    assert load_compact(tmp_path / "run").mask.kept == load_mask(whole).kept


def test_the_same_command_again_repeats_no_stage(made, capsys):
    folder, options = made
    files = [*folder.glob("calibration-*/*"), *folder.glob("mask-*/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    ended, log = weights(folder), losses(folder)
    train_lori.main([*options, "--output_dir", str(folder)])
    assert all(torch.equal(ended[name][1], weights(folder)[name][1]) for name in ended)
    assert losses(folder) == log and read_run(folder).info["steps"] == 4
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert capsys.readouterr().out.count("done before") == 2


@pytest.mark.thorough
def test_another_density_makes_another_mask_without_another_calibration(made, tmp_path, capsys):
    whole, options = made
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train_lori.main([*options, "--output_dir", str(run), "--lori_density", "0.5"])
    assert capsys.readouterr().out.count("done before") == 1
    mask = load_mask(run)
    assert mask.density == 0.5 and mask.kept == mask.size // 2
    assert read_run(run).info["trainable_parameters"] == mask.kept
    assert load_compact(run).mask.kept >= load_compact(whole).mask.kept


@pytest.mark.parametrize("change", [["--seed", "5"], ["--lori_seed", "5"]])
def test_changed_options_use_nothing_of_the_run_before(made, tmp_path, change):
    whole, options = made
    shutil.copytree(whole, tmp_path / "run")
    train_lori.main([*options, *change, "--output_dir", str(tmp_path / "run")])
    train_lori.main([*options, *change, "--output_dir", str(tmp_path / "fresh")])
    assert same(tmp_path / "run", tmp_path / "fresh")
    assert losses(tmp_path / "run") == losses(tmp_path / "fresh")
    assert not same(tmp_path / "run", whole)


@pytest.mark.thorough
def test_a_training_killed_under_other_options_is_not_gone_on_with(made, tmp_path, monkeypatch):
    whole, options = made
    other = [*options, "--learning_rate", "0.02", "--calibration_learning_rate", "0.001"]
    options = [*options, "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        killed_at(patch, ComparisonCallback, "on_step_begin", at_step(4, 4))
        with pytest.raises(Killed):
            train_lori.main([*other, "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    train_lori.main(options)
    assert same(tmp_path / "run", whole)


def test_entries_off_the_mask_stay_those_of_the_adapter_it_starts_from(made, tmp_path):
    first, options = made
    second = [*options, "--lori_start", str(first), "--exclude_masks", str(first), "--seed", "3"]
    train_lori.main([*second, "--weight_decay", "0.1", "--output_dir", str(tmp_path)])
    before, after = load_mask(first).masks, load_mask(tmp_path).masks
    start, end = weights(first), weights(tmp_path)
    for name in start:
        assert not (before[name] & after[name]).any()
        assert torch.equal(start[name][1][~after[name]], end[name][1][~after[name]])
        assert torch.equal(start[name][0], end[name][0])
    assert any(not torch.equal(start[name][1], end[name][1]) for name in start)
    moved = load_scores(stage(tmp_path, "calibration")).scores
    ended = weights(stage(tmp_path, "calibration"))
    for name in start:
        assert torch.equal(moved[name], (ended[name][1] - start[name][1]).abs())


@pytest.mark.parametrize("source", ["magnitude_gradient", "gradient", "random"])
def test_only_a_mask_that_needs_it_takes_a_calibration_run(made, tmp_path, source):
    _, options = made
    calibrates = source == "magnitude_gradient"
    options = options if calibrates else uncalibrated(options)
    train_lori.main([*options, "--mask_source", source, "--output_dir", str(tmp_path)])
    assert len(list(tmp_path.glob("calibration-*"))) == calibrates
    assert load_mask(tmp_path).source["kind"] == source
    assert read_run(tmp_path).completed


def test_masks_of_a_teacher_and_of_a_file_are_trained(made, tmp_path):
    folder, options = made
    options = uncalibrated(options)
    teacher = LoraAdapter(stage(folder, "calibration"))
    factors = {name: teacher[name].factors() for name in teacher}
    save_factors(tmp_path / "factors", factors, FactorsMetadata())
    taught = [*options, "--mask_source", "teacher", "--svd_factors", f"{tmp_path}/factors"]
    train_lori.main([*taught, "--output_dir", str(tmp_path / "taught")])
    mask = load_mask(tmp_path / "taught")
    # The teacher is a B over this very A, so that projecting it gives its own entries.
    expected = load_mask(folder).masks
    assert all(torch.equal(mask.masks[name], expected[name]) for name in expected)
    given = [*options, "--mask_source", str(folder), "--output_dir", str(tmp_path / "given")]
    train_lori.main(given)
    assert same(tmp_path / "given", folder)


def test_the_configuration_in_the_repository_runs(made, tmp_path):
    _, options = made
    at = options.index("--lora_r")
    config = Path(__file__).parents[2] / "recipes/configs/train_lori.yaml"
    quick = ["--config", str(config), *options[:at], "--max_steps", "2", "--lora_r", "4"]
    train_lori.main([*quick, "--calibration_steps", "2", "--output_dir", str(tmp_path)])
    assert load_mask(tmp_path).density == 0.1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lori_density", "0"], "density must be in (0, 1], got 0.0"),
        (["--lori_density", "1"], "trains all of B and needs no mask"),
        (["--lori_scope", "2:8", "--lori_density", "0.5"], "set --lori_density=0.25"),
        (["--lori_floor", "0.3"], "--lori_floor must be in [0, --lori_density=0.25]"),
        (["--lora_r", "0"], "must be positive"),
        (["--calibration_steps", "0"], "calibration_steps must be at least 1"),
        (["--mask_source", "teacher"], "--svd_factors and --mask_source=teacher need each other"),
        (["--svd_factors", "x"], "--svd_factors and --mask_source=teacher need each other"),
        (["--mask_source", "random"], "--calibration_steps and --calibration_learning_rate need"),
        (["--init_batches", "0"], "init_batches must be at least 1"),
        (["--lora_rank", "4"], "unknown option --lora_rank"),
    ],
)
def test_contradictory_options_are_refused_in_one_line(made, extra, message, capsys):
    _, options = made
    with pytest.raises(SystemExit) as exit_:
        train_lori.main([*options, *extra])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--exclude_masks", "{run}", "--lori_seed", "3"], "belongs to the A of seed 0"),
        (["--exclude_masks", "{run}", "--lori_density", "0.9"], "lower the density, or exclude"),
        (["--exclude_masks", "{run}", "--lora_r", "4"], "masks of one rank can be disjoint"),
        (["--lori_start", "{run}/nothing"], "nothing"),
        (["--lori_start", "{run}", "--lori_seed", "3"], "has another A than --lori_seed draws"),
        (["--lori_start", "{run}", "--lora_alpha", "8"], "here it is 4, so that the same B"),
        (["--lori_density", "0.0001"], "keeps none of the"),
        (["--lora_target_modules", "nowhere"], "matches no linear layer"),
    ],
)
def test_what_cannot_work_is_refused_before_the_calibration(made, tmp_path, extra, message):
    folder, options = made
    extra = [each.replace("{run}", str(folder)) for each in extra]
    with pytest.raises(SystemExit, match="error: ") as exit_:
        train_lori.main([*options, *extra, "--output_dir", str(tmp_path / "run")])
    assert message in str(exit_.value)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--mask_source", "magnitudes"], "mask_source must be one of magnitude"),
        (["--mask_source", "{run}", "--lori_density", "0.5"], "set --lori_density=0.25"),
        (
            ["--mask_source", "{run}", "--lori_seed", "1"],
            "set --lori_density=0.25 and --lori_seed=0",
        ),
        (["--mask_source", "{run}", "--lora_r", "4"], "--mask_source is for rank 2, r is 4"),
    ],
)
def test_a_given_mask_of_another_kind_is_refused(made, tmp_path, extra, message):
    folder, options = made
    extra = [each.replace("{run}", str(folder)) for each in extra]
    run = [*uncalibrated(options), *extra, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="error: ") as exit_:
        train_lori.main(run)
    assert message in str(exit_.value)


@pytest.mark.parametrize("name", ["checkpoint-7/trainer_state.json", "adapter_model.safetensors"])
def test_what_another_recipe_left_is_not_deleted(made, tmp_path, name):
    _, options = made
    left = tmp_path / name
    left.parent.mkdir(exist_ok=True)
    left.write_text("days of work")
    with pytest.raises(SystemExit, match=f"has {name.split('/')[0]} of another recipe"):
        train_lori.main([*options, "--output_dir", str(tmp_path)])
    assert left.read_text() == "days of work"


def test_a_checkpoint_given_by_its_path_is_kept_and_the_training_noted(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    training = Task("train", "training", {"rank": 4}, lambda folder: None, root=tmp_path)
    arguments = LoriArguments(
        output_dir=str(tmp_path), resume_from_checkpoint=str(checkpoint), use_cpu=True
    )
    train_lori.prepare_folder(training, arguments)
    assert checkpoint.is_dir()
    assert json.loads((tmp_path / train_lori.RECORD).read_text())["digest"] == training.digest


@pytest.mark.parametrize("option", ["lori_start", "mask_source", "exclude_masks"])
def test_a_training_does_not_replace_what_it_reads(made, tmp_path, option):
    folder, options = made
    shutil.copytree(folder, tmp_path / "run")
    weights = tmp_path / "run/adapter_model.safetensors"
    before = weights.read_bytes()
    chosen = uncalibrated(options) if option == "mask_source" else options
    extra = [f"--{option}", f"{tmp_path}/other/../run", "--output_dir", str(tmp_path / "run")]
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match=f"error: --{option}: .* choose another --output_dir"):
        train_lori.main([*chosen, *extra])
    assert weights.read_bytes() == before


def test_two_processes_calibrate_and_train_one_adapter(made, tmp_path):
    _, options = made
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(root / "recipes" / "train_lori.py"), *options, "--expected_processes", "2"]
    command += ["--mask_source", "magnitude_gradient", "--output_dir", str(tmp_path)]
    path = os.pathsep.join([str(root), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[1/2] calibration") == 1
    mask, run = load_mask(tmp_path), read_run(tmp_path)
    assert run.completed and run.info["world_size"] == 2
    assert load_compact(tmp_path).mask.kept <= mask.kept == run.info["trainable_parameters"]


def test_different_masks_on_different_machines_are_an_error(made, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(lori_stages, "gather_object", lambda found: [*found, "another"])
    with pytest.raises(RuntimeError, match="put output_dir on a file system that they share"):
        lori_stages.check_agreement(folder)
