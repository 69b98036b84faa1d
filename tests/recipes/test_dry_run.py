"""`--dry_run true`: the estimate from a configuration alone, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import compare_inits
import pytest
import train_full_teacher
import train_lora
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from peft_svdinit.training import RecipeArguments

CONFIG = Path(__file__).parents[2] / "recipes/configs/7b_on_one_32gb_card.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of which there is the configuration only."""
    place = tmp_path_factory.mktemp("configuration")
    LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64,
    ).save_pretrained(place)  # fmt: skip
    return str(place)


def dry(folder, tmp_path) -> list[str]:
    output = str(tmp_path / "out")
    return ["--dry_run", "true", "--model_name_or_path", folder, "--output_dir", output]


@pytest.mark.parametrize(
    ("recipe", "trained"), [(train_lora, "LoRA of rank 2"), (train_full_teacher, "all parameters")]
)
def test_a_configuration_is_enough_and_nothing_is_written(
    folder, tmp_path, capsys, recipe, trained
):
    rank = ["--lora_r", "2"] if recipe is train_lora else []
    recipe.main([*dry(folder, tmp_path), *rank, "--use_cpu", "true"])
    told = capsys.readouterr().out
    assert trained in told and "4 x 512 tokens, without gradient checkpointing" in told
    assert not (tmp_path / "out").exists()


def test_a_start_that_keeps_its_first_factors_needs_them_in_memory(folder, tmp_path, capsys):
    frozen = []
    for start in ("delta", "reference"):
        factors = ["--init", "svd", "--svd_factors", "not-made-yet", "--svd_start", start]
        train_lora.main([*dry(folder, tmp_path), *factors, "--use_cpu", "true"])
        frozen.append(re.search(r"frozen weights +(\S+)", capsys.readouterr().out)[1])  # pyright: ignore
    assert float(frozen[1]) > float(frozen[0])


def test_a_start_from_an_adapter_counts_its_layers_alone(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    config = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    source = ["--init_from", str(tmp_path / "adapter"), "--lora_r", "2", "--use_cpu", "true"]
    train_lora.main([*dry(folder, tmp_path), *source])
    # Two layers of 16 x 16 at rank 2.
    assert " 128 parameters" in capsys.readouterr().out


def test_fsdp_divides_weights_without_buckets(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RecipeArguments, "splits_state", True)
    # Other programs write to the disk between the two estimates.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    devices = ["--dry_run_devices", "2", "--use_cpu", "true"]
    train_lora.main([*dry(folder, tmp_path), *devices])
    by_launch = capsys.readouterr().out
    train_lora.main([*dry(folder, tmp_path), *devices, "--dry_run_zero_stage", "3"])
    assert by_launch == capsys.readouterr().out and "of DDP" not in by_launch


def test_the_7b_configuration_fits_its_card_as_its_comment_says(tmp_path, capsys, monkeypatch):
    # As `mixed_precision: bf16` of recipes/accelerate/single_gpu.yaml.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
    ).save_pretrained(tmp_path)  # fmt: skip
    common = [*dry(str(tmp_path), tmp_path), "--config", str(CONFIG), "--use_cpu", "true"]
    compare_inits.main([*common, "--teacher", "full"])
    told = capsys.readouterr().out
    assert "40,370,176 parameters" in told and "7,615,616,512 parameters" in told
    lora, full = (float(size) for size in re.findall(r"in all +(\S+) GiB", told))
    assert lora < 28 < full
    comment = " ".join(CONFIG.read_text().split("model_name_or_path")[0].split())
    assert f"{lora:.2f} GiB" in comment and f"{full:.2f} GiB for the teacher" in comment


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (train_lora, ["--optim", "lion_32bit"], "--optim=lion_32bit has a state of unknown size"),
        (train_lora, ["--init_from", "gone/missing"], "init_from"),
        (train_lora, ["--rank_budget", "1"], "rank 1"),
        (train_lora, ["--dry_run_zero_stage", "4"], "--dry_run_zero_stage must be in 0..3"),
        (train_lora, ["--model_name_or_path", "gone/missing"], "no configuration"),
        (train_full_teacher, ["--load_in_4bit", "true"], "cannot be fully fine-tuned"),
        (compare_inits, ["--lora_r", "65"], "--lora_r=65 is above --teacher_rank=64"),
    ],
)
def test_a_wrong_option_is_one_line(folder, tmp_path, capsys, recipe, options, message):
    with pytest.raises(SystemExit) as ended:
        recipe.main([*dry(folder, tmp_path), "--use_cpu", "true", *options])
    line = str(ended.value.code) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert message in line and len(line.strip().splitlines()) == 1
