"""A tiny causal language model with a tokenizer, and a small data set, on the disk."""

from __future__ import annotations

import json
from pathlib import Path

from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import tiny_model


def save_model(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", seed=seed, vocab_size=len(tokenizer), pad_token_id=1)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def save_dataset(path: Path, rows: int = 60) -> Path:
    lines = [
        json.dumps({"prompt": f"{number} plus {number} is ", "completion": str(2 * number)})
        for number in range(rows)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def shared_options(folder: Path) -> list[str]:
    """Command-line options of a tiny run, model and data included."""
    return [
        "--model_name_or_path",
        str(save_model(folder / "model")),
        "--dataset_name",
        str(save_dataset(folder / "data.jsonl")),
        *("--max_eval_samples", "4", "--per_device_train_batch_size", "2"),
        *("--learning_rate", "0.01", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--lora_r", "2", "--lora_alpha", "4", "--eval_on_start", "true"),
    ]
