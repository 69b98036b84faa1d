"""Runs made of formulas, for tests of the comparison; nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_svdinit.training import Run

COUNTED = {"kind": "synthesised", "steps": 40, "tokens": 40_000, "seconds": 80.0, "sunk": False}
SUNK = {"kind": "given", "steps": 500, "tokens": 500_000, "seconds": 900.0, "sunk": True}
MOMENTS = "SVD delta, moments carried"
CONTEXT = {
    "model": "a tiny Llama",
    "dataset": "docstrings",
    "machine": "2 CPU cores",
    "student_steps": 60,
    "teacher_steps": 40,
    "lora_r": 8,
    "teacher_rank": 16,
    "teacher_kind": "lora",
    "synthesis": {"tail_decay": 0.8, "noise_share": 0.01, "energy_kept_mean": 0.9731},
    "command": "python recipes/compare_inits.py --seeds 0 1 2",
}


def make_run(
    method: str,
    seed: int = 0,
    losses: Sequence[float] = (2.0, 1.5, 1.2, 1.0),
    *,
    every: int = 20,
    label: str | None = None,
    budget: str = "student",
    learning_rate: float = 1e-3,
    sweep: bool = False,
    teacher: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **info: Any,
) -> Run:
    """A completed run evaluated to `losses` at steps 0, `every`, 2 `every`, …

    A step costs 2 seconds and 1000 tokens. `extra` replaces the comparison's description.
    """
    steps = every * (len(losses) - 1)
    log: list[dict[str, Any]] = []
    for number, value in enumerate(losses):
        step = number * every
        row = dict.fromkeys(("epoch", "loss", "learning_rate", "grad_norm", "peak_memory_mb"))
        row |= {"step": step, "tokens": 1000 * step, "seconds": 2.0 * step}
        if step:
            log.append({**row, "loss": 1.5, "learning_rate": learning_rate, "eval_loss": None})
        log.append({**row, "eval_loss": value})
    about = {
        "method": method,
        "label": label or method,
        "budget": budget,
        "learning_rate": learning_rate,
        "sweep": sweep,
        "teacher": teacher,
    }
    name = f"{method}-{'sweep-' if sweep else ''}{learning_rate:g}-seed{seed}"
    return Run(
        Path("runs") / name,
        {
            "format_version": 1,
            "status": "completed",
            "name": name,
            "seed": seed,
            "data_seed": seed,
            "steps": steps,
            "max_steps": steps,
            "tokens": 1000 * steps,
            "seconds": 2.0 * steps,
            "peak_memory_mb": 100.0,
            "trainable_parameters": 1000,
            "total_parameters": 50_000,
            "world_size": 1,
            "metrics": {"eval_loss": losses[-1]},
            "versions": {"torch": "2.11"},
            "git_revision": None,
            "hardware": {"cpu_cores": 2, "device": "cpu", "memory_gb": 8.0},
            "started": "2026-01-01T00:00:00Z",
            "finished": "2026-01-01T00:02:00Z",
            "extra": {"comparison": about} if extra is None else extra,
            **info,
        },
        log,
    )


def curve(start: float, end: float, points: int, jitter: float = 0.0) -> list[float]:
    """An exponential approach from `start` to nearly `end`, shifted by `jitter` after the start."""
    decay = [math.exp(-3.5 * number / (points - 1)) for number in range(points)]
    return [end + (start - end) * share + jitter * (share < 1) for share in decay]


def whole_experiment(seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """All kinds of methods: counted and sunk teachers, the total budget, and a sweep."""
    runs: list[Run] = []
    options: dict[str, Any]
    for seed in seeds:
        noise, wobble = 0.01 * math.sin(7.0 * seed + 1), 0.004 * math.cos(5.0 * seed)
        for method, label, start, end, wobbles, options in (
            ("random", "random", 1.82, 0.94, 0, {}),
            ("random_total", "random, total budget", 1.82, 0.88, -1, {"budget": "total"}),
            ("svd_delta", "SVD delta", 1.06, 0.91, 1, {"teacher": COUNTED}),
            ("svd_delta_moments", MOMENTS, 1.06, 0.88, 2, {"teacher": COUNTED}),
            ("svd_subspace", "SVD subspace", 1.82, 0.935, -1, {"teacher": COUNTED}),
            ("pissa_niter_4", "PiSSA", 1.82, 0.99, 1, {"learning_rate": 5e-4}),
            ("svd_given", "SVD delta of a given teacher", 1.0, 0.86, -2, {"teacher": SUNK}),
        ):
            points = 21 if "budget" in options else 13
            losses = curve(start, end, points, noise + wobbles * wobble)
            runs.append(make_run(method, seed, losses, every=5, label=label, **options))
    for method, label in (("random", "random"), ("pissa_niter_4", "PiSSA")):
        for rate, end in ((2.5e-4, 1.05), (5e-4, 0.99), (1e-3, 0.97), (2e-3, 1.0)):
            options = {"label": label, "learning_rate": rate, "sweep": True}
            runs.append(make_run(method, 0, curve(1.82, end, 7), every=5, **options))
    return runs
