"""The recipe of progressive low rank, run as a user runs it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import progressive_lowrank
import pytest
import torch
from stages.low_rank_options import LowRankOptions
from support.byte_tokenizer import byte_tokenizer
from support.recipe_inputs import save_dataset
from support.switching_runs import wide_model
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from peft_svdinit.low_rank import load_low_rank, low_rank_layers
from peft_svdinit.training import read_run


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = byte_tokenizer()
    model = wide_model(vocab_size=len(tokenizer), pad_token_id=1)
    model.save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    return [
        *("--model_name_or_path", str(folder / "model")),
        *("--dataset_name", str(save_dataset(folder / "data.jsonl"))),
        *("--max_eval_samples", "4", "--per_device_train_batch_size", "2", "--max_steps", "5"),
        *("--learning_rate", "0.01", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--attention_ratio", "0.25", "--feed_forward_ratio", "0.25"),
    ]


def ranks(folder: Path) -> set[int]:
    layers = json.loads((folder / "low_rank.json").read_text())["layers"]
    return {layer["rank"] for layer in layers.values()}


def test_a_run_leaves_a_dense_model_with_its_factors_and_a_record(options, tmp_path, capsys):
    progressive_lowrank.main([*options, "--output_dir", str(tmp_path)])
    run = read_run(tmp_path)
    assert run.completed and run.info["steps"] == 5
    [switch] = run.info["extra"]["low_rank"]["switches"]
    assert switch["step"] == 1 and switch["seconds"] > 0
    assert switch["parameters_before"] > 2 * switch["parameters"]
    assert "14 layers at ranks 8 to 16" in capsys.readouterr().out
    low, dense = load_low_rank(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(low_rank_layers(low)) == 14 and not low_rank_layers(dense)
    rates = [row["learning_rate"] for row in run.log if row["learning_rate"]]
    assert rates[-1] == pytest.approx(0.005)


def test_the_dynamic_scheme_from_the_start(options, tmp_path):
    schedule = ["--switch", "step", "--switch_step", "0", "--shrink_shares", "0.4"]
    progressive_lowrank.main(
        [*options, *schedule, "--shrink_ratios", "0.13", "--output_dir", str(tmp_path)]
    )
    assert ranks(tmp_path) == {8}


def test_two_trainers_convert_between_them_and_go_on_where_they_were(options, tmp_path, capsys):
    two = [*options, "--in_place", "false", "--output_dir", str(tmp_path), "--switch_share", "0.4"]
    progressive_lowrank.main([*two, "--save_steps", "1", "--save_total_limit", "9"])
    run = read_run(tmp_path)
    assert run.completed and run.info["steps"] == 3 and len(list(tmp_path.glob("full_rank-*"))) == 1
    whole = load_low_rank(tmp_path).state_dict()
    # Killed in the second stage: it goes on from its checkpoint, and nothing is trained anew.
    last = get_last_checkpoint(str(tmp_path))
    assert last is not None and last.endswith("checkpoint-3")
    for path in Path(last).iterdir():
        path.unlink()
    Path(last).rmdir()
    capsys.readouterr()
    progressive_lowrank.main(
        [*two, "--save_steps", "1", "--save_total_limit", "9", "--resume_from_checkpoint", "last"]
    )
    assert "full_rank: done before" in capsys.readouterr().out
    again = load_low_rank(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--switch", "epoch"], "switch=epoch and lowrank_switch_epoch belong together"),
        (["--switch_step", "3"], "switch=step and switch_step belong together"),
        (["--switch", "step", "--switch_step", "5"], "switch is after 5 of max_steps=5 steps"),
        (["--attention_ratio", "1.5"], "ratio must be in"),
        (["--min_size", "9000000"], "no layer is cheaper at low rank"),
        (["--low_rank_target_modules", "nothing"], "matches no linear layer"),
        (["--shrink_shares", "0.5"], "must be as many"),
        (["--in_place", "false", "--switch", "loss_plateau"], "after a known number of steps"),
        (["--load_in_4bit", "true"], "quantised model cannot be fully fine-tuned"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_any_work(
    extra, message, options, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        progressive_lowrank.main([*options, *extra, "--output_dir", str(tmp_path / "run")])
    said = f"{ended.value}{capsys.readouterr().err}".replace("--", "")
    assert message in said
    assert not (tmp_path / "run").exists()


def test_energy_and_parameters_take_the_place_of_ratios():
    assert LowRankOptions(rank_energy=0.5).rule.energy == 0.5
    assert LowRankOptions(rank_parameters=10**6).rule.ratio is None
    assert LowRankOptions(attention_ratio=None).rule.ratio == {"feed_forward": 0.15}


def test_two_trainers_where_parameters_are_split_and_only_what_they_can_follow():
    split: Any = SimpleNamespace(splits_state=True)
    whole: Any = SimpleNamespace(splits_state=False)
    assert LowRankOptions().is_in_place(whole) and not LowRankOptions().is_in_place(split)
    for options in (
        LowRankOptions(switch="loss_plateau"),
        LowRankOptions(rebalance_steps=2),
        LowRankOptions(shrink_shares=[0.5], shrink_ratios=[0.05]),
    ):
        assert options.is_in_place(whole)
        with pytest.raises(ValueError, match="FSDP and DeepSpeed need a switch between two"):
            options.is_in_place(split)
