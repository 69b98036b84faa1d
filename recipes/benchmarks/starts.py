"""Starts from weights, gradients and activations: ours against PEFT's own, in one run.

    python recipes/benchmarks/starts.py [--quick]

All linear layers of SmolLM2-135M, rank 16; gradients and activations over four batches of 4 x 128
tokens of source code of Python's standard library. Timed on one thread, in CPU seconds, each once:

- the principal part of the weights against PEFT's `pissa` (full SVD) and `pissa_niter_4`, with the
  share of the best rank-16 energy that each captures;
- gradients against PEFT's `lora_ga`;
- directions of activations against PEFT's `eva`, which gets a time limit: it runs in a process of
  its own, and a limit that is hit makes the ratio a lower bound.

`--quick` takes the first six of thirty transformer blocks and one batch, and leaves EVA out.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svdinit import SvdLoraConfig, activation_factors, gradient_factors
from peft_svdinit.models import linear_modules
from peft_svdinit.training import resolve_model

_RANK = 16
_MODEL = "builtin:smollm2-135m"


def load(blocks: int | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(resolve_model(_MODEL), dtype=torch.float32)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
    return model.eval()


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    text = "".join(map(inspect.getsource, (argparse, copy, inspect)))
    ids = AutoTokenizer.from_pretrained(resolve_model(_MODEL))(text)["input_ids"]
    rows = torch.tensor(ids[: count * 4 * 128]).view(count, 4, 128)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows
    ]


def targets(model: Any) -> list[str]:
    """By name, for PEFT's `lora_ga` refuses "all-linear"."""
    return sorted({name.rpartition(".")[2] for name in linear_modules(model)})


def adapted(model: Any, **options: Any) -> Any:
    config = {"r": _RANK, "lora_alpha": _RANK, "target_modules": targets(model), **options}
    kind = SvdLoraConfig if "svd_source" in options else LoraConfig
    return get_peft_model(model, kind(**config, task_type="CAUSAL_LM"))


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


@torch.no_grad()
def product_energies(model: Any) -> dict[str, float]:
    """‖B A‖_F² of every layer."""
    energies = {}
    for name, A in model.named_parameters():
        if ".lora_A." in name:
            B = model.get_parameter(name.replace(".lora_A.", ".lora_B."))
            energies[name] = float(((B.mT @ B) * (A @ A.mT)).sum())
    return energies


def lora_ga(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    options: dict[str, Any] = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=targets(model), **options)

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    get_peft_model(model, config)


def eva(batches: list[dict[str, torch.Tensor]], answer: Any) -> None:
    torch.set_num_threads(1)
    model = adapted(load(None), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    answer.send("ready")
    seconds, _ = cpu_seconds(
        lambda: initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    )
    answer.send(seconds)


def limited_eva(batches: list[dict[str, torch.Tensor]], limit: float) -> tuple[float, bool]:
    """CPU seconds of PEFT's EVA, or the limit and False if it takes longer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=eva, args=(batches, theirs))
    process.start()
    try:
        ours.recv()
        finished = ours.poll(limit)
        return (ours.recv(), True) if finished else (limit, False)
    finally:
        process.kill()
        process.join()


class Table:
    """Rows of timed work."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []

    def timed(self, label: str, work: Callable[[], Any]) -> tuple[float, Any]:
        seconds, found = cpu_seconds(work)
        self.rows.append((label, seconds, ""))
        return seconds, found


def compare_weights(base: Any, table: Table) -> dict[str, float]:
    weight = {"svd_source": "weight", "svd_start": "reference", "svd_split": "balanced"}
    starts = {
        "weight, principal: ours": weight,
        "weight, minor: ours": {**weight, "svd_part": "minor"},
        "PEFT pissa": {"init_lora_weights": "pissa"},
        "PEFT pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    }
    seconds, energies = {}, {}
    for label, options in starts.items():
        model = copy.deepcopy(base)
        seconds[label], started = table.timed(label, partial(adapted, model, **options))
        energies[label] = product_energies(started)
    ours, _, full, fast = seconds.values()
    best = energies["PEFT pissa"]

    def captured(label: str) -> float:
        return sum(energies[label][name] / best[name] for name in best) / len(best)

    return {
        "weight_speedup_over_pissa": round(full / ours, 1),
        "weight_speedup_over_pissa_niter_4": round(fast / ours, 2),
        "weight_captured": round(captured("weight, principal: ours"), 4),
        "pissa_niter_4_captured": round(captured("PEFT pissa_niter_4"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--eva_limit", type=float, default=240, help="seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, batches = load(6 if options.quick else None), make_batches(1 if options.quick else 4)
    table = Table()
    result: dict[str, Any] = compare_weights(base, table)
    mine, _ = table.timed(
        "gradients: ours", lambda: gradient_factors(base, batches, rank=2 * _RANK)
    )
    theirs, _ = table.timed("PEFT lora_ga", partial(lora_ga, copy.deepcopy(base), batches))
    result["gradient_speedup_over_lora_ga"] = round(theirs / mine, 2)
    mine, _ = table.timed(
        "activations: ours", lambda: activation_factors(base, batches, rank=_RANK)
    )
    table.timed(
        "activations, weighted: ours",
        lambda: activation_factors(base, batches, rank=_RANK, weighting="weight"),
    )
    if not options.quick:
        theirs, finished = limited_eva(batches, options.eva_limit)
        table.rows.append(("PEFT eva", theirs, "" if finished else "stopped at the limit"))
        result["activation_speedup_over_eva"] = round(theirs / mine, 1)
        result["eva_finished"] = finished
    print(f"{'':<30} CPU seconds")
    for label, seconds, note in table.rows:
        print(f"{label:<30} {seconds:11.2f}  {note}")
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
