"""`--push_to_hub true` of the recipes, against a Hub on this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import compare_inits
import pytest
import train_lora
import yaml
from support.hub import READ, WRITE, stand_in_hub
from support.recipe_inputs import save_dataset, save_model

from peft_svdinit.files import hub as asking
from peft_svdinit.training import ModelOptions, RecipeArguments, parse_options


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "WAITS", (0.0,))
    monkeypatch.chdir(tmp_path)
    save_dataset(Path("data.jsonl"))
    with stand_in_hub() as server, server.in_this_process(tmp_path / "cache", WRITE):
        server.add("user/base", save_model(Path("model")))
        yield server


OPTIONS = [
    *("--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--max_eval_samples", "4"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--use_cpu", "true"),
    *("--disable_tqdm", "true", "--lora_r", "2", "--max_steps", "2", "--push_to_hub", "true"),
    *("--hub_model_id", "user/shared"),
]
NAMED = ["--hub_base_model", "user/base"]


def test_a_run_is_pushed_with_its_figures_and_its_command(server, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"eval_on_start": True, "save_strategy": "no"}))
    options = [
        str(tmp_path / word) if word in ("model", "data.jsonl") else word for word in OPTIONS
    ]
    train_lora.main([*options, *NAMED, "--output_dir", "out", "--config", str(config)])
    files = server.files("user/shared")
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert {"adapter_model.safetensors", "run.json", "peft_svdinit_results.png"} <= files.keys()
    assert not [name for name in files if name.endswith(".bin")]
    card = files["README.md"].decode()
    loss = json.loads(files["run.json"])["metrics"]["eval_loss"]
    assert f"| evaluation loss at the end | {loss:.4f} |" in card and "`data.jsonl`" in card
    assert "- dataset: data.jsonl" in card
    (command,) = re.findall(r"```bash\npython (.*)\n```", card)
    script, *argv = shlex.split(command)
    assert script == "recipes/train_lora.py" and not {"--config", "--push_to_hub"} & set(argv)
    again = parse_options((ModelOptions, RecipeArguments), _known(argv), description="")
    assert again[0].model_name_or_path == "user/base" and again[1].eval_on_start
    assert not [name for name in tmp_path.rglob("*") if name.is_file() and holds_token(name)]
    assert not [name for name, content in files.items() if WRITE.encode() in content]


def _known(argv: list[str]) -> list[str]:
    """Without what is of other classes."""
    start = {
        name: argv.index(name) for name in ("--dataset_name", "--max_eval_samples", "--lora_r")
    }
    gone = {position + shift for position in start.values() for shift in (0, 1)}
    return [word for position, word in enumerate(argv) if position not in gone]


def holds_token(path: Path) -> bool:
    return WRITE.encode() in path.read_bytes()


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        (None, NAMED, "error: --hub_"),
        (READ, NAMED, "does not let your token write"),
        (WRITE, [], "error: --hub_base_model: the base model is model, a path of this disk"),
        (WRITE, [*NAMED, "--hub_token", "hf_secret"], "--hub_token would be saved with the run"),
        (WRITE, [*NAMED, "--hub_strategy", "every_save"], "--hub_strategy must be end"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_training(
    server, tmp_path, capsys, token, options, message
):
    with server.in_this_process(tmp_path / "other", token), pytest.raises(SystemExit) as ended:
        train_lora.main([*OPTIONS, *options, "--output_dir", "out"])
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert message in said and "hf_secret" not in said
    assert not Path("out").exists() and not server.requests("commit")


def test_a_push_that_fails_after_the_training_says_how_to_do_it_by_hand(server, tmp_path):
    server.fail("commit", status=403)
    with pytest.raises(SystemExit, match=r"`svdinit push --folder 'my out' .*--revision next`"):
        train_lora.main([*OPTIONS, *NAMED, "--hub_revision", "next", "--output_dir", "my out"])
    assert Path("my out", "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_card_of_a_comparison_repeats_it(server, tmp_path, monkeypatch):
    quick = "--teacher_steps 2 --teacher_rank 4 --eval_steps 1 --seeds 0 --starts delta".split()
    compare_inits.main([*OPTIONS, *NAMED, *quick, "--output_dir", "out"])
    card = server.files("user/shared")["README.md"].decode()
    (command,) = re.findall(r"```bash\npython (.*)\n```", card)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_dataset(elsewhere / "data.jsonl")
    monkeypatch.chdir(elsewhere)
    script, *argv = shlex.split(command)
    assert script == "recipes/compare_inits.py"
    compare_inits.main(argv)
    report = (elsewhere / "out" / "comparison_report.md").read_text()
    for title in ("Results", "Equal student steps", "Equal total budget"):
        assert section(card, f"### {title}") == section(report, f"## {title}")
    assert "paired" in section(card, "### Equal total budget").lower()
    assert "peft_svdinit_results.png" in card and "## Limits" in card


def section(text: str, heading: str) -> str:
    """The table below a heading."""
    rest = text.partition(f"{heading}\n")[2]
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
