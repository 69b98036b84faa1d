"""Every recipe in turn in one of several processes; run by the test of the launch files.

Arguments: the folder of the inputs that `save_inputs` makes, one for what the recipes write, their
names, `train_lora` among them, and options for all of them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import compare_inits
import continual
import progressive_lowrank
import train_full_teacher
import train_lora
import train_lori
from accelerate import PartialState
from stages.processes import leave_process_group

from peft_svdinit import FactorsMetadata, LowRankFactors, save_factors
from peft_svdinit.models import linear_modules
from support.byte_tokenizer import byte_tokenizer
from support.recipe_inputs import save_dataset
from support.switching_runs import wide_model

STEPS = 10
EVERY = [
    "train_lora", "train_lori", "train_full_teacher", "progressive_lowrank", "compare_inits",
    "continual",
]  # fmt: skip


def save_inputs(folder: Path) -> None:
    """A model, data, and factors of a delta of the model's size."""
    import torch

    tokenizer = byte_tokenizer()
    model = wide_model(vocab_size=len(tokenizer), pad_token_id=1)
    model.save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    save_dataset(folder / "data.jsonl", rows=120)
    save_dataset(folder / "other.jsonl", rows=40)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name, layer in linear_modules(model).items():
        delta = torch.randn(layer.out_features, layer.in_features, generator=generator) / 50
        factors[name] = LowRankFactors.from_delta(delta, 4)
    save_factors(folder / "factors", factors, FactorsMetadata())


def options_of(recipe: str, inputs: Path) -> list[str]:
    """What a recipe is told, the folder that it writes to aside."""
    dataset = str(inputs / "data.jsonl")
    options = [
        *("--model_name_or_path", str(inputs / "model"), "--max_eval_samples", "4"),
        *("--learning_rate", "0.003", "--disable_tqdm", "true"),
    ]
    if recipe == "continual":
        options += ["--first_dataset_name", dataset, "--second_dataset_name"]
        options += [str(inputs / "other.jsonl")]
        options = [each for each in options if each not in ("--learning_rate", "0.003")]
        return [*options, "--schemes", "lori", "--seeds", "0", "--max_steps", "2", "--lora_r", "4"]
    options += ["--dataset_name", dataset]
    if recipe in ("train_lora", "train_lori"):
        # Checkpoints, and nothing else, at step 5.
        options += ["--max_steps", str(STEPS), "--save_steps", "5", "--save_total_limit", "9"]
        options += ["--lora_r", "4", "--eval_strategy", "no", "--eval_on_start", "false"]
    if recipe == "train_lora":
        return [*options, "--init", "svd", "--svd_factors", str(inputs / "factors")]
    if recipe == "train_lori":
        return [*options, "--calibration_steps", "4", "--lori_density", "0.25"]
    if recipe == "compare_inits":
        options += ["--seeds", "0", "--teacher_steps", "2", "--teacher_rank", "4", "--lora_r", "2"]
        options += ["--starts", "delta", "gradient:delta", "--init_batches", "2"]
    if recipe == "progressive_lowrank":
        options += ["--attention_ratio", "0.25", "--feed_forward_ratio", "0.25"]
    return [*options, "--max_steps", "2"]


def run(recipe: str, options: list[str]) -> None:
    """One recipe as its command runs it."""
    modules = (
        train_lora, train_lori, train_full_teacher, progressive_lowrank, compare_inits, continual
    )  # fmt: skip
    {module.__name__: module for module in modules}[recipe].main(options)


def main(inputs: Path, outputs: Path, recipes: list[str], given: list[str]) -> None:
    for recipe in recipes:
        options = [*options_of(recipe, inputs), *given, "--output_dir", str(outputs / recipe)]
        total = "2" if recipe in ("compare_inits", "continual") else "4"
        run(recipe, [*options, "--total_train_batch_size", total])
    # A run that was killed before the last process had written its part of the second checkpoint.
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.copytree(outputs / "train_lora", outputs / "killed")
        max((outputs / "killed" / "checkpoint-10").glob("rng_state*.pth")).unlink()
    PartialState().wait_for_everyone()
    options = [*options_of("train_lora", inputs), *given, "--output_dir", str(outputs / "killed")]
    resume = ["--total_train_batch_size", "4", "--resume_from_checkpoint", "last"]
    run("train_lora", [*options, *resume])
    # Ranks and a start for which gradients pass through a model that may be in shards.
    options = [*options_of("train_lora", inputs), *given, "--output_dir", str(outputs / "budget")]
    options = [each for each in options if "factors" not in each]
    budget = ["--svd_source", "gradient", "--rank_budget", "20000", "--max_steps", "2"]
    # The batches that gradients are taken of are those of one device.
    run("train_lora", [*options, *budget, "--per_device_train_batch_size", "2"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:])
    leave_process_group()
