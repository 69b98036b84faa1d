"""Short trainings of the embedded model on the embedded tasks, each done once and recorded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from peft_svdinit.files import write_json
from peft_svdinit.training import DataOptions, completion_collator, prepare_examples

BATCH = 4


@dataclass(frozen=True)
class Record:
    """What was found, by key, in one JSON file: a killed study goes on where it was."""

    file: Path

    def results(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        if key not in self.results():
            found = work()
            write_json(self.file, {**self.results(), key: found})
            print(f"{key:<52} {found}", flush=True)
        return self.results()[key]

    def check(self, key: str, value: Any) -> None:
        """Raise SystemExit if the file has results of another setting."""
        found = self.once(key, lambda: value)
        if found != value:
            raise SystemExit(
                f"error: {self.file} has results of {key}={found}, this run takes {value}; choose "
                "another place"
            )


@dataclass(frozen=True)
class Task:
    """Batches and held-out halves of one embedded data set."""

    name: str
    model: Any
    tokenizer: Any
    validation: int = 32  # examples
    test: int = 64

    @cached_property
    def data(self) -> tuple[Any, Any]:
        count = self.validation + self.test
        options = DataOptions(dataset_name=f"builtin:{self.name}", max_eval_samples=count)
        return prepare_examples(options, self.tokenizer)

    def batches(self, seed: int, count: int) -> Iterator[Mapping[str, Tensor]]:
        collate = completion_collator(self.tokenizer)
        order = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(seed))
        for first in range(0, count * BATCH, BATCH):
            yield collate([self.data[0][index] for index in order[first : first + BATCH].tolist()])

    @torch.no_grad()
    def loss(self, model: Any, part: str) -> float:
        """Nats per token on the examples to choose by ("validation") or to report ("test")."""
        rows = list(self.data[1])
        rows = rows[: self.validation] if part == "validation" else rows[self.validation :]
        rows.sort(key=lambda row: len(row["input_ids"]))
        collate = completion_collator(self.tokenizer)
        total, tokens = 0.0, 0
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16])
            # The loss is the mean over predicted tokens, the first of a row not among them.
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += model.eval()(**batch).loss.item() * count
            tokens += count
        return total / tokens


def train(model: Any, batches: Iterator[Mapping[str, Tensor]], steps: int, rate: float) -> None:
    """AdamW with a linear schedule and warm-up, gradients clipped at 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    for batch in batches:
        model.train()(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def best_rate(rates: Sequence[float], loss: Callable[[float], float]) -> float:
    """The learning rate of the lowest loss, with a worse one on either side.

    The sweep goes on beyond its ends while the best is at one; a single rate is taken as it is.
    """
    tried = list(rates)
    while True:
        found = {rate: loss(rate) for rate in tried}
        best = min(found, key=found.__getitem__)
        if len(tried) == 1 or best not in (min(tried), max(tried)):
            return best
        beyond = best / 10**0.5 if best == min(tried) else best * 10**0.5
        tried.append(float(f"{beyond:.0e}"))
