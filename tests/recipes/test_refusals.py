"""A sample of wrong inputs of every recipe: one line of error, and nothing trained before it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_inits
import continual
import evaluate_adapter
import progressive_lowrank
import pytest
import train_full_teacher
import train_lora
import train_lori
from peft import LoraConfig, get_peft_model
from support.recipe_inputs import save_dataset, save_model
from support.tiny_models import tiny_model, truncate
from transformers import Trainer

ROWS = [{"prompt": str(row), "completion": "b"} for row in range(4)]
OTHERS: dict[str, bytes] = {
    "empty.jsonl": b"",
    "no_rows.json": b"[]",
    "line_3.jsonl": "\n".join(map(json.dumps, ROWS[:2])).encode() + b'\n{"prompt": }\n',
    "latin.jsonl": "\n".join(map(json.dumps, ROWS)).encode() + b'\n{"prompt": "\xe4"}\n',
    "numbers.jsonl": b'{"prompt": "a", "completion": 1}\n' * 4,
    "nothing.jsonl": b'{"prompt": "a", "completion": ""}\n' * 4,
    "words.jsonl": b'{"messages": ["a", "b"]}\n' * 4,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_dataset(folder / "data.jsonl")
    save_dataset(folder / "other.jsonl", rows=40)
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    save_model(folder / "damaged")
    truncate(folder / "damaged" / "model.safetensors")
    deep = save_model(folder / "deep") / "config.json"
    entries = {**json.loads(deep.read_text()), "num_hidden_layers": 10**7}
    deep.write_text(json.dumps(entries))
    base = tiny_model(vocab_size=258, pad_token_id=1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    base.name_or_path = "someone/other"
    get_peft_model(base, config).save_pretrained(str(folder / "stranger"))
    return folder


RECIPES: dict[str, Callable[[list[str]], None]] = {
    module.__name__: module.main
    for module in (
        compare_inits, continual, evaluate_adapter, progressive_lowrank, train_full_teacher,
        train_lora, train_lori,
    )
}  # fmt: skip
OWN = {
    "train_lora": ["--lora_r", "2"],
    "train_lori": ["--lora_r", "2", "--lori_density", "0.5"],
    "compare_inits": ["--lora_r", "2", "--teacher_rank", "4", "--seeds", "0"],
    "continual": ["--lora_r", "2", "--lori_density", "0.5", "--seeds", "0"],
}


def options_of(recipe: str, folder: Path) -> list[str]:
    given = ["--model_name_or_path", str(folder / "model"), *OWN.get(recipe, [])]
    data = ["--dataset_name", str(folder / "data.jsonl")]
    if recipe == "evaluate_adapter":
        return [*given, *data, "--adapters", str(folder / "stranger"), "--device", "cpu"]
    given += ["--use_cpu", "true", "--max_steps", "2"]
    if recipe == "continual":
        data = ["--first_dataset_name", data[1], "--second_dataset_name"]
        data += [str(folder / "other.jsonl")]
    return [*given, *data]


@pytest.mark.parametrize(
    ("recipe", "given", "says"),
    [
        ("train_lora", "--dataset_name {}/empty.jsonl", "--dataset_name: .*the file is empty"),
        ("train_lora", "--dataset_name {}/no_rows.json", "--dataset_name: cannot load"),
        ("train_lora", "--dataset_name {}/line_3.jsonl", "--dataset_name: .*line 3 is no JSON"),
        ("train_lora", "--dataset_name {}/numbers.jsonl", "--completion_column: .*must hold text"),
        ("train_lora", "--dataset_name {}/nothing.jsonl", "each completion, reply or text is empt"),
        ("train_lora", "--dataset_name {}/words.jsonl", "no chat template"),
        ("train_lora", "--dataset_name json", "'json' is a format; give the path of a file"),
        ("train_lora", "--dataset_config main", "--dataset_config=main is of a data set of the"),
        ("train_lora", "--text_column body", "--text_column=body is not used"),
        ("train_lora", "--split_seed -1", "--split_seed must be in 0.."),
        ("train_lora", "--model_name_or_path {}/damaged", "--model_name_or_path: .*not a readable"),
        ("train_lora", "--model_name_or_path {}/deep", "num_hidden_layers must be at most"),
        ("train_full_teacher", "--model_name_or_path {}/deep", "num_hidden_layers must be at"),
        ("train_lora", "--init pisa", "--init: 'pisa' is no start .*; did you mean pissa?"),
        ("train_lora", "--init pissa --lora_r 9", "it makes rank 8, not --lora_r=9"),
        ("train_lora", "--init lora_ga", "only this package's own starts are given"),
        ("train_lora", "--svd_start subspac", "--svd_start must be one of .*mean subspace?"),
        ("train_lora", "--svd_start subspace", "--svd_start=subspace needs --init=svd"),
        ("train_lora", "--lora_dropout 1", r"--lora_dropout must be in \[0, 1\), got 1.0"),
        ("train_lora", "--lora_target_modules q_porj", "q_porj'} not found"),
        ("train_lora", "--output_dir {}/data.jsonl", "--output_dir: .* cannot be a folder"),
        ("train_full_teacher", "--dataset_name {}/latin.jsonl", "line 5 is no text in UTF-8"),
        ("train_full_teacher", "--attn_implementation sdp", "--attn_implementation"),
        ("train_lori", "--calibration_learning_rate 0", "must be above 0, got 0.0"),
        ("train_lori", "--lori_seed -1", "--lori_seed must be in 0.."),
        ("progressive_lowrank", "--rebalance_steps 0", "--rebalance_steps must be at least 1"),
        ("progressive_lowrank", "--low_rank_target_modules q", "--low_rank_target_modules=..q.. m"),
        ("compare_inits", "--peft_inits pissa olra", "--peft_inits: 'olra' .*did you mean olora?"),
        (
            "compare_inits",
            "--peft_inits pissa --lora_r 9 --teacher_rank 9",
            "--peft_inits: .*rank 8",
        ),
        ("compare_inits", "--peft_inits eva eva", "--peft_inits must be different"),
        ("compare_inits", "--sweep_lr 0.1 0", r"--sweep_lr must be above 0, got \[0.1, 0.0\]"),
        ("compare_inits", "--sweep_lr 0.1 0.1", "--sweep_lr must be different"),
        ("compare_inits", "--starts delta delta", "--starts must be different"),
        ("compare_inits", "--starts delt", "--starts must be of .*did you mean delta?"),
        ("compare_inits", "--teacher_learning_rate 0", "--teacher_learning_rate must be above 0"),
        ("compare_inits", "--max_steps -1", "--max_steps must be at least 1"),
        ("compare_inits", "--teacher_adapter {}/stranger", "--teacher_adapter: .*'someone/other'"),
        ("continual", "--second_dataset_name {}/line_3.jsonl", "--second_dataset_name: .*line 3"),
        ("continual", "--schemes lora lora", "--schemes must be different"),
        ("continual", "--lora_learning_rate -1", "--lora_learning_rate must be above 0"),
        ("continual", "--lora_target_modules q", "--lora_target_modules=..q.. matches no linear"),
        ("evaluate_adapter", "--metrics lost", "--metrics must be of .*did you mean loss?"),
        (
            "evaluate_adapter",
            "--output_dir {}/data.jsonl/run",
            "--output_dir: .*cannot be a folder",
        ),
    ],
)
def test_a_wrong_input_is_one_line_before_any_training(
    recipe: str, given: str, says: str, inputs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("trains"))
    words = given.format(*[inputs] * given.count("{}")).split()
    output = [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        RECIPES[recipe]([*options_of(recipe, inputs), *output, *words])
    printed = capsys.readouterr().err.strip()
    said = printed.splitlines()[-1] if exit_.value.code == 2 else str(exit_.value)
    assert said.count("\n") == 0 and "error: " in said
    assert re.search(says, said), said
    assert not (tmp_path / "run" / "runs").exists()
