"""What LoRI learns beside LoRA: equal steps, a sweep of learning rates per method, several seeds.

    python recipes/benchmarks/lori_quality.py --output_dir runs/lori_quality [--quick]

SmolLM2-135M, rank 32 on all linear layers, density 0.1, on the embedded tasks. Methods: LoRA;
LoRI-D (A random and frozen, B dense); LoRI-S over the mask of that LoRI-D, over a random mask, over
the mask of the gradients at the start, and over the calibrated mask with another A. A method's
learning rate is swept with the first seed until the best one lies inside of what was tried, by the
loss on one part of the held-out examples; what is reported is the loss on the rest. A calibrated
mask costs its own run of as many steps before.

Then, given three seeds, three tasks are merged, LoRA's adapters and LoRI's, by concatenation and by
PEFT's linear merge. Task number i takes seed number i, so that no two adapters begin at one A; the
third task takes the learning rates of the first. What is in the folder already is not run again; a
folder is for one number of steps. Ends with a line `RESULT {json}`: mean test losses.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import options_parser
from peft import LoraConfig, PeftModel, get_peft_model
from short_runs import Record, Task, best_rate, spread, train

from peft_svdinit import LoriConfig
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.masks import (
    LayerScores,
    LoriMask,
    Selection,
    load_mask,
    magnitude_scores,
    save_mask,
)
from peft_svdinit.training import (
    ModelOptions,
    load_model,
    load_tokenizer,
)
from peft_svdinit.tuner import gradient_scores, input_sizes

RANK, ALPHA, DENSITY = 32, 64, 0.1
TASKS = ("stdlib-docstrings", "python-topics", "stdlib-names")
# The rates that a sweep begins with; it goes on beyond them while the best is at an end.
RATES = {
    "lora": (3e-4, 1e-3, 3e-3),
    "lori_d": (1e-3, 3e-3, 1e-2),
    "calibrated": (3e-3, 1e-2, 3e-2),
    "random": (3e-3, 1e-2, 3e-2),
    "gradient": (3e-3, 1e-2, 3e-2),
    "fresh_a": (3e-3, 1e-2, 3e-2),
}
MERGED = ("lora", "calibrated")
MERGE_WEIGHT = 0.4  # of each of three adapters, as the reference's scripts have it for LoRI-S


@dataclass(frozen=True)
class Study:
    """All runs on one base model, whose results are kept in one file."""

    base: Any
    folder: Path
    steps: int
    seeds: Sequence[int]
    rates: Mapping[str, Sequence[float]]

    @property
    def record(self) -> Record:
        return Record(self.folder / "results.json")

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        return self.record.once(key, work)

    def adapter(self, task: Task, method: str, seed: int, rate: float) -> Path:
        return self.folder / "adapters" / f"{task.name}-{method}-{seed}-{rate:g}"

    def validation(self, task: Task, method: str, seed: int, rate: float) -> float:
        """Train if that was not done yet; the loss to choose by."""
        key = f"{task.name} {method} seed={seed} lr={rate:g} validation"
        return self.once(key, lambda: self.train(task, method, seed, rate))

    def test(self, task: Task, method: str, seed: int, rate: float) -> float:
        """The loss to report."""
        self.validation(task, method, seed, rate)

        def measure() -> float:
            folder = str(self.adapter(task, method, seed, rate))
            model = PeftModel.from_pretrained(self.base, folder)
            loss = task.loss(model, "test")
            model.unload()
            return loss

        return self.once(f"{task.name} {method} seed={seed} lr={rate:g} test", measure)

    def train(self, task: Task, method: str, seed: int, rate: float) -> float:
        torch.manual_seed(seed)
        model = get_peft_model(self.base, self.config(task, method, seed))
        train(model, task.batches(seed, self.steps), self.steps, rate)
        loss = task.loss(model, "validation")
        model.save_pretrained(str(self.adapter(task, method, seed, rate)))
        model.unload()
        return loss

    def config(self, task: Task, method: str, seed: int) -> LoraConfig:
        options: dict[str, Any] = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        if method == "lora":
            return LoraConfig(**options)
        # One A per task and seed.
        options["lori_seed"] = 100 * seed + TASKS.index(task.name)
        if method == "lori_d":
            return LoriConfig(**options, lori_density=1.0)
        if method == "random":
            return LoriConfig(**options, lori_density=DENSITY)
        if method == "fresh_a":
            options["lori_seed"] += 50
        mask = self.mask(task, method, seed, options["lori_seed"])
        return LoriConfig(**options, lori_density=DENSITY, lori_mask=str(mask))

    def mask(self, task: Task, method: str, seed: int, lori_seed: int) -> Path:
        path = self.folder / "masks" / f"{task.name}-{method}-{seed}.safetensors"
        if path.is_file():
            return path
        if method == "fresh_a":
            mask = load_mask(self.mask(task, "calibrated", seed, lori_seed - 50))
            sizes = {name: layer.in_features for name, layer in mask.layers.items()}
            source = {"kind": "calibrated over another A"}
            mask = LoriMask.over(mask.masks, sizes, seed=lori_seed, density=DENSITY, source=source)
            return save_mask(path, mask)
        if method == "gradient":
            model = get_peft_model(self.base, self.config(task, "lori_d", seed))
            scores, sizes = gradient_scores(model, task.batches(seed, 8)), input_sizes(model)
            model.unload()
        else:
            rate = self.best_rate(task, "lori_d")
            self.validation(task, "lori_d", seed, rate)
            saved = LoraAdapter(self.adapter(task, "lori_d", seed, rate))
            scores = magnitude_scores({name: layer.lora_B for name, layer in saved.items()})
            sizes = {name: layer.shape[1] for name, layer in saved.items()}
        layers = LayerScores(scores, sizes, lori_seed, {"kind": method})
        return save_mask(path, layers.mask(Selection(DENSITY, floor=0.001)))

    def best_rate(self, task: Task, method: str) -> float:
        """The best learning rate on the first seed, with a worse one on either side."""
        if task.name == TASKS[2]:
            task = replace(task, name=TASKS[0])
        return best_rate(self.rates[method], partial(self.validation, task, method, self.seeds[0]))

    def merged(self, tasks: Sequence[Task], method: str, how: str) -> dict[str, float]:
        """Test loss on every task of the adapters of all tasks merged into one."""
        model = None
        for task, seed in zip(tasks, self.seeds, strict=True):
            rate = self.best_rate(task, method)
            self.validation(task, method, seed, rate)
            folder = str(self.adapter(task, method, seed, rate))
            if model is None:
                model = PeftModel.from_pretrained(self.base, folder, adapter_name=task.name)
            else:
                model.load_adapter(folder, adapter_name=task.name)
        assert model is not None
        names = [task.name for task in tasks]
        model.add_weighted_adapter(
            names, [MERGE_WEIGHT] * len(names), "merged", combination_type=how
        )
        model.set_adapter("merged")
        losses = {task.name: task.loss(model, "test") for task in tasks}
        model.unload()
        return losses


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lori_quality"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    steps, seeds, rates = options.steps, options.seeds, RATES
    if options.quick:
        steps, seeds = 2, seeds[:1]
        rates = {method: RATES[method][1:2] for method in ("lora", "lori_d", "calibrated")}
    base, tokenizer = load_model(ModelOptions()), load_tokenizer(ModelOptions())
    study = Study(base, options.output_dir, steps, seeds, rates)
    study.record.check("steps", steps)
    tasks = [Task(name, base, tokenizer) for name in TASKS]
    compared = tasks[:1] if options.quick else tasks[:2]
    for task in compared:
        for method in rates:
            study.best_rate(task, method)
    for task in compared if options.quick else tasks:
        untrained = study.once(f"{task.name} base", lambda task=task: task.loss(base, "test"))
        print(f"{task.name:<20} {'untrained':<24} {untrained:.4f}")
    result: dict[str, float] = {}
    for task in compared:
        for method in rates:
            rate = study.best_rate(task, method)
            losses = [study.test(task, method, seed, rate) for seed in seeds]
            result[f"{task.name} {method}"] = round(statistics.mean(losses), 4)
            print(f"{task.name:<20} {method:<12} lr {rate:<7g}  {spread(losses)}")
    if len(seeds) == len(tasks):
        compare_merges(study, tasks)
    print(f"RESULT {json.dumps(result)}")


def compare_merges(study: Study, tasks: Sequence[Task]) -> None:
    """Print the losses of every method's adapters, alone and merged."""
    for method in MERGED:
        alone = [
            study.test(task, method, seed, study.best_rate(task, method))
            for task, seed in zip(tasks, study.seeds, strict=True)
        ]
        print(f"{method:<12} {'alone':<8} {'  '.join(f'{loss:.4f}' for loss in alone)}")
        for how in ("cat", "linear"):
            work = partial(study.merged, tasks, method, how)
            found = study.once(f"merged {method} {how}", work).values()
            print(f"{method:<12} {how:<8} {'  '.join(f'{loss:.4f}' for loss in found)}")


if __name__ == "__main__":
    main()
