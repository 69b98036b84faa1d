"""Tiny Trainer runs with a switch to low rank, and what is compared of two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from support.tiny_models import tiny_model

WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True},
    "gpt2": {"n_embd": 64},
}


def wide_model(architecture: Any = "llama", **options: Any) -> PreTrainedModel:
    """A tiny model whose layers are large enough for a rank of 8 to be cheaper."""
    return tiny_model(architecture, **{**WIDE[architecture], **options})


def examples(count: int = 40, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (length,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    model: Any = None,
    optimizers: Any = (None, None),
    **options: Any,
) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=wide_model(attention_dropout=0.1) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=examples(),  # pyright: ignore[reportArgumentType]
        eval_dataset=examples(8),  # pyright: ignore[reportArgumentType]
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def train(folder: Path, *callbacks: TrainerCallback, resume: Any = None, **options: Any) -> Trainer:
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def plain_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    optimizer: Any = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def differences(one: Trainer, other: Trainer) -> list[str]:
    """What two trainings ended with differently, bit by bit."""
    weights = [dict(t.model.state_dict()) for t in (one, other)]  # pyright: ignore
    found = [str(set(weights[0]) ^ set(weights[1]))] if set(weights[0]) ^ set(weights[1]) else []
    found += [name for name, w in weights[0].items() if not torch.equal(w, weights[1][name])]
    states = [plain_optimizer(t).state_dict() for t in (one, other)]
    if states[0]["param_groups"] != states[1]["param_groups"]:
        found.append("param_groups")
    if set(states[0]["state"]) != set(states[1]["state"]):
        return [*found, "states"]
    return found + [
        f"state {index} {name}"
        for index, state in states[0]["state"].items()
        for name, value in state.items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][index][name]))
    ]
