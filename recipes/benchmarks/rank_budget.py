"""Does a budget of parameters learn more where spectra say where to spend it?

    nice python recipes/benchmarks/rank_budget.py [--quick]

SmolLM2-135M on the embedded docstrings: a LoRA of one rank on all linear layers; ranks by the
gradients of the first four batches of the run, or by their activations, within as many parameters.
All else is the same, the scaling of every layer included. Every arm takes the best learning rate of
its own sweep, with seed 100 and by the loss on held-out examples that are not reported; where the
rates found differ, all arms are shown at each of them too, for one seed chooses rates roughly. The
reported seeds differ in data order and in the draw of A. What is in the record already is not run
again. Ends with a line `RESULT {json}`: mean test losses, and the differences of the arms to one
rank with their 95 % t intervals over seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import options_parser
from peft import LoraConfig, get_peft_model
from short_runs import Record, Task, best_rate, spread, train

from peft_svdinit import activation_factors, gradient_factors, recommend_ranks, relative_spectra
from peft_svdinit.analysis import paired_difference
from peft_svdinit.factors import target_layers
from peft_svdinit.training import ModelOptions, load_model, load_tokenizer

RECORD = Path(__file__).parents[1] / "figures" / "rank_budget.json"
SCALING = 2.0
MEASURED_BATCHES = 4
TUNING_SEED = 100
RATES = (3e-4, 1e-3, 3e-3)
ARMS = ("uniform", "gradient", "activation")


@dataclass(frozen=True)
class Study:
    """All runs within the parameters of one rank."""

    base: Any
    task: Task
    record: Record
    rank: int
    steps: int
    found: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def validation(self, arm: str, rate: float) -> float:
        """Loss to choose the learning rate by."""
        return self.loss(arm, TUNING_SEED, rate, "validation")

    def loss(self, arm: str, seed: int, rate: float, part: str) -> float:
        key = f"rank {self.rank} {arm} seed={seed} lr={rate:g} {part}"
        return self.record.once(key, partial(self.trained, arm, seed, rate, part))

    def trained(self, arm: str, seed: int, rate: float, part: str) -> float:
        if (arm, seed) not in self.found:
            self.found[arm, seed] = self.ranks(arm, seed)
        options = self.found[arm, seed]
        torch.manual_seed(seed)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        model = get_peft_model(self.base, config)
        train(model, self.task.batches(seed, self.steps), self.steps, rate)
        loss = self.task.loss(model, part)
        model.unload()
        return loss

    def ranks(self, arm: str, seed: int) -> dict[str, Any]:
        """What LoraConfig is told of ranks and alphas; what they hold goes to the record."""
        if arm == "uniform":
            return {"r": self.rank, "lora_alpha": SCALING * self.rank}
        batches = self.task.batches(seed, MEASURED_BATCHES)
        if arm == "gradient":
            spectra: Any = gradient_factors(self.base, batches, rank=4 * self.rank)
        else:
            spectra = relative_spectra(activation_factors(self.base, batches, rank=4 * self.rank))
        found = recommend_ranks(spectra, max_parameters=self.parameters)
        about = {
            "parameters": found.parameters,
            "of": self.parameters,
            "ranks": [min(found.ranks.values()), max(found.ranks.values())],
            "energy": round(found.energy, 5),
            "uniform_energy": round(found.uniform_energy, 5),
        }
        self.record.once(f"rank {self.rank} {arm} seed={seed} ranks", lambda: about)
        return found.config_options(scaling=SCALING)

    @property
    def parameters(self) -> int:
        layers = target_layers(self.base).values()
        return self.rank * sum(layer.out_features + layer.in_features for layer in layers)


def compared(study: Study, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """All arms at their own learning rates; where these differ, also all at each of the rates."""
    best = {arm: best_rate(rates, partial(study.validation, arm)) for arm in ARMS}
    result = reported(study, best, seeds)
    shared = sorted(set(best.values()))
    for rate in shared if len(shared) > 1 else ():
        result[f"all at {rate:g}"] = reported(study, dict.fromkeys(ARMS, rate), seeds)
    return result


def reported(study: Study, rates: Mapping[str, float], seeds: Sequence[int]) -> dict[str, Any]:
    """Losses of the arms at these rates, printed, and what goes into the result."""
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            losses[arm].append(study.loss(arm, seed, rates[arm], "test"))
    result: dict[str, Any] = {}
    for arm in ARMS:
        result[arm] = round(statistics.mean(losses[arm]), 4)
        print(f"rank {study.rank:<3} {arm:<12} lr {rates[arm]:<7g} {spread(losses[arm])}")
    for arm in ARMS[1:]:
        found = paired_difference(losses[arm], losses["uniform"])
        interval = [round(end, 4) for end in found.interval or ()]
        result[f"{arm} - uniform"] = {"mean": round(found.mean or 0.0, 4), "interval": interval}
        print(f"rank {study.rank:<3} {arm} - uniform: {found.mean:+.4f}, 95 % {interval}")
    return result


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = load_model(ModelOptions()), load_tokenizer(ModelOptions())
    with TemporaryDirectory() as folder:
        if options.quick:
            record, steps, seeds, rates = Record(Path(folder, "record.json")), 2, [0], RATES[1:2]
            task = Task("stdlib-docstrings", base, tokenizer, validation=4, test=8)
        else:
            record, steps = Record(options.record), options.steps
            seeds, rates = options.seeds, RATES
            task = Task("stdlib-docstrings", base, tokenizer, validation=48, test=96)
        record.check("steps", steps)
        ranks = options.ranks[:1] if options.quick else options.ranks
        untrained = record.once("untrained test", lambda: task.loss(base, "test"))
        result: dict[str, Any] = {"untrained": round(untrained, 4)}
        for rank in ranks:
            study = Study(base, task, record, rank, steps)
            result[f"rank {rank}"] = compared(study, rates, seeds)
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
