"""Two tasks in turn: whole runs of every scheme, what they leave, killed, skipped, misused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import continual
import pytest
import torch
from support.recipe_inputs import save_dataset, save_model

from peft_svdinit.factors import LoraAdapter
from peft_svdinit.masks import load_mask
from peft_svdinit.training import Task, read_run


def save_words(path: Path, rows: int = 40) -> Path:
    lines = [
        json.dumps({"prompt": f"spell {n}: ", "completion": "ab" * (n % 5)}) for n in range(rows)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """All schemes with one seed, and the options that made them."""
    folder = tmp_path_factory.mktemp("continual")
    options = ["--model_name_or_path", str(save_model(folder / "model"))]
    options += ["--first_dataset_name", str(save_dataset(folder / "first.jsonl"))]
    options += ["--second_dataset_name", str(save_words(folder / "second.jsonl"))]
    options += [
        "--max_eval_samples",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--use_cpu",
        "true",
    ]
    options += ["--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "v_proj", "up_proj"]
    options += ["--max_steps", "4", "--lori_density", "0.25", "--lori_learning_rate", "0.03"]
    continual.main([*options, "--seeds", "3", "--output_dir", str(folder / "out")])
    return folder / "out", options


def run_folder(out: Path, name: str) -> Path:
    (found,) = (out / "runs").glob(f"{name}-seed3-*")
    return found


def numbers(out: Path) -> dict[str, dict]:
    return {run["scheme"]: run for run in json.loads((out / "continual.json").read_text())["runs"]}


def factor_B(folder: Path) -> dict[str, torch.Tensor]:
    adapter = LoraAdapter(folder)
    return {name: adapter[name].lora_B for name in adapter}


def test_every_scheme_has_a_row_with_losses_of_both_tasks_at_every_stage(learnt):
    out, _ = learnt
    found = numbers(out)
    assert list(found) == ["lora", "lori", "lori_exclude", "shared_first", "shared_second"]
    for run in found.values():
        for stage in ("base", "one", "two"):
            assert run["losses"][stage].keys() == {"first", "second"}
        assert run["losses"]["base"] == found["lora"]["losses"]["base"]
        expected = run["losses"]["two"]["first"] - run["losses"]["one"]["first"]
        assert run["forgetting"] == expected
    report = (out / "continual.md").read_text()
    assert report.count("| LoRI, masks apart |") == 2 and "of one seed" in report
    assert (out / "continual.png").stat().st_size > 10_000


def test_stage_two_begins_where_stage_one_ended(learnt):
    out, _ = learnt
    found = numbers(out)
    for scheme, name in (
        ("lora", "lora-second"),
        ("lori", "lori-second"),
        ("lori_exclude", "lori_exclude-second"),
        ("shared_first", "shared-first"),
        ("shared_second", "shared-second"),
    ):
        rows = read_run(run_folder(out, name)).log
        begun = next(row["eval_first_loss"] for row in rows if row["eval_first_loss"] is not None)
        assert begun == pytest.approx(found[scheme]["losses"]["one"]["first"], abs=1e-6)


def test_schemes_train_for_equal_steps_on_equally_many_tokens_of_equal_examples(learnt):
    out, _ = learnt
    assert {run["steps"] for run in numbers(out).values() if "shared" not in run["scheme"]} == {8}
    tokens = {
        name: read_run(run_folder(out, name)).info["tokens"]
        for name in ("lora-first", "lori-first", "lora-second", "lori-second", "shared")
    }
    assert tokens["lora-first"] == tokens["lori-first"]
    assert tokens["lora-second"] == tokens["lori-second"]
    parts = [read_run(run_folder(out, f"shared-{task}")).info for task in ("first", "second")]
    assert [part["steps"] for part in parts] == [2, 2]
    assert tokens["shared"] + sum(part["tokens"] for part in parts) == sum(
        tokens[name] for name in ("lora-first", "lora-second")
    )


def test_masks_apart_leave_the_entries_of_the_first_adapter_bit_by_bit(learnt):
    out, _ = learnt
    first = factor_B(run_folder(out, "lori-first"))
    mask = load_mask(run_folder(out, "lori-first")).masks
    apart = factor_B(run_folder(out, "lori_exclude-second"))
    own = factor_B(run_folder(out, "lori-second"))
    for name in first:
        assert torch.equal(apart[name][mask[name]], first[name][mask[name]])
        assert torch.equal(apart[name] != first[name], (apart[name] != 0) & ~mask[name])
    assert any((own[name] != first[name])[mask[name]].any() for name in first)
    found = numbers(out)
    assert found["lori_exclude"]["changed"] == 0 < found["lori"]["changed"] < 1
    assert found["lora"]["changed"] > 0.9


def test_parts_change_the_shared_adapter_on_their_masks_alone(learnt):
    out, _ = learnt
    shared = factor_B(run_folder(out, "shared"))
    for task in ("first", "second"):
        folder = run_folder(out, f"shared-{task}")
        part, mask = factor_B(folder), load_mask(folder).masks
        for name in shared:
            assert torch.equal(part[name][~mask[name]], shared[name][~mask[name]])
        assert 0 < numbers(out)[f"shared_{task}"]["changed"] <= 0.25


def test_the_same_command_again_skips_every_task(learnt, capsys):
    out, options = learnt
    before = (out / "continual.md").read_text()
    continual.main([*options, "--seeds", "3", "--output_dir", str(out)])
    lines = re.findall(r"^\[\d+/\d+\] .*$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 17 and all(line.endswith("done before") for line in lines)
    assert (out / "continual.md").read_text() == before


@pytest.mark.thorough
def test_another_rate_of_lora_runs_lora_alone_again(learnt, tmp_path, capsys):
    out, options = learnt
    shutil.copytree(out, tmp_path / "out")
    changed = [*options, "--lora_learning_rate", "0.01", "--seeds", "3"]
    continual.main([*changed, "--output_dir", str(tmp_path / "out")])
    lines = re.findall(r"^\[\d+/\d+\] .*$", capsys.readouterr().out, re.MULTILINE)
    again = [line.split()[1] for line in lines if not line.endswith("done before")]
    assert again == ["lora-first-seed3", "lora-second-seed3"]
    assert numbers(tmp_path / "out")["lora"]["losses"] != numbers(out)["lora"]["losses"]
    assert numbers(tmp_path / "out")["lori"] == numbers(out)["lori"]


def test_killed_before_every_task_in_turn_it_ends_as_one_that_was_not(
    learnt, tmp_path, monkeypatch
):
    out, options = learnt
    again = [*options, "--seeds", "3", "--schemes", "lori", "lori_exclude"]
    mark, marked = Task.mark_done, []

    class Killed(Exception):
        pass

    def dies(self, seconds):
        # The work is done and not yet marked: the worst moment, for it is all done again.
        if self.name not in marked:
            marked.append(self.name)
            raise Killed
        mark(self, seconds)

    monkeypatch.setattr(Task, "mark_done", dies)
    for _ in range(8):
        with pytest.raises(Killed):
            continual.main([*again, "--output_dir", str(tmp_path)])
    continual.main([*again, "--output_dir", str(tmp_path)])
    assert len(set(marked)) == 8
    found = numbers(out)
    assert numbers(tmp_path) == {name: found[name] for name in ("lori", "lori_exclude")}


@pytest.mark.thorough
def test_the_configuration_in_the_repository_runs_with_two_seeds(learnt, tmp_path):
    _, options = learnt
    config = Path(__file__).parents[2] / "recipes/configs/continual.yaml"
    quick = ["--config", str(config), *options, "--max_steps", "2", "--schemes", "lora", "lori"]
    quick += ["--calibration_steps", "2", "--seeds", "0", "1", "--output_dir", str(tmp_path)]
    continual.main(quick)
    report = (tmp_path / "continual.md").read_text()
    assert "over 2 seeds" in report and "±" in report


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--schemes", "full"], "schemes must be of lora, lori, lori_exclude, shared"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--dataset_name", "x.jsonl"], "use --first_dataset_name and --second_dataset_name"),
        (["--second_dataset_name", "builtin:stdlib-docstrings"], "must differ"),
        (["--lori_density", "2"], "density must be in (0, 1]"),
    ],
)
def test_contradictory_options_are_refused_in_one_line(extra, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        continual.main(["--use_cpu", "true", *extra])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max_steps", "3"], "max_steps must be even and at least 2, got 3"),
        (["--max_steps", "-1"], "max_steps must be even and at least 2, got -1"),
        (["--learning_rate", "0.1"], "learning_rate is set for every run; use a rate for each"),
        (["--seed", "1"], "seed is set for every run; use seeds"),
        (["--push_to_hub", "true"], "push_to_hub is of no use here"),
    ],
)
def test_options_that_belong_to_single_runs_are_refused(extra, message):
    with pytest.raises(SystemExit, match=f"^error: --{message}"):
        continual.main(["--use_cpu", "true", *extra])


def test_masks_apart_that_cannot_both_be_kept_are_refused_before_anything_is_trained(
    learnt, tmp_path
):
    _, options = learnt
    dense = [*options, "--lori_density", "0.6", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"error: .*exclude less"):
        continual.main(dense)
    assert not (tmp_path / "out").exists()


def test_stage_two_of_lora_prepares_a_quantised_base_as_stage_one_does(
    learnt, tmp_path, monkeypatch
):
    import train_lora
    from stages import lori_stages

    _, options = learnt
    prepared = []
    for module in (lori_stages, train_lora):
        load, name = module.load_model, module.__name__

        def quantised(options, load=load):
            model = load(options)
            model.is_quantized = True
            return model

        def prepare(model, name=name):
            prepared.append(name)
            model.is_quantized = False
            return model

        monkeypatch.setattr(module, "load_model", quantised)
        monkeypatch.setattr(module, "prepare_model_for_kbit_training", prepare)
    continual.main([*options, "--schemes", "lora", "--seeds", "3", "--output_dir", str(tmp_path)])
    assert prepared == ["train_lora", "stages.lori_stages"]


def test_a_missing_data_set_is_named_before_anything_is_trained(learnt, tmp_path):
    _, options = learnt
    gone = [*options, "--second_dataset_name", str(tmp_path / "gone.jsonl")]
    with pytest.raises(SystemExit, match="error: --second_dataset_name: there is no file"):
        continual.main([*gone, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
