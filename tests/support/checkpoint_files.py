"""Checkpoints of few bytes, with the files that the Trainer writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ALONE = {"processes": 1, "save_only_model": False}


def state(folder: Path, step: int, note: dict[str, Any] | None = None) -> None:
    kept = {} if note is None else {"checkpoint": {"args": {}, "attributes": note}}
    content = {"global_step": step, "stateful_callbacks": kept}
    (folder / "trainer_state.json").write_text(json.dumps(content))


def tensors(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(8)}, path)


def archives(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        torch.save({"x": torch.zeros(8)}, path)


def saved(root: Path, step: int = 4, note: dict[str, Any] | None = ALONE) -> Path:
    """A checkpoint of an adapter as the Trainer leaves it."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    tensors(folder / "adapter_model.safetensors")
    archives(*(folder / name for name in ("optimizer.pt", "scheduler.pt", "training_args.bin")))
    processes = note["processes"] if note else 1
    ranks = [""] if processes == 1 else [f"_{rank}" for rank in range(processes)]
    archives(*(folder / f"rng_state{rank}.pth" for rank in ranks))
    state(folder, step, note)
    return folder
