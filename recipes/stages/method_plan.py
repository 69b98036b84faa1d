"""The tasks of `method_comparison.py`: the base, what starts are taken from, and the runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from peft_svdinit import __version__
from peft_svdinit.files import file_stamps
from peft_svdinit.training import Task, resolve_model
from stages.method_data import MethodData
from stages.method_options import MethodDataOptions, MethodOptions
from stages.method_protocol import Experiment
from stages.method_runs import MethodRun, measure_base
from stages.method_starts import (
    KINDS,
    LORI_MASK,
    TEACHER,
    TRAINED,
    StartMaker,
    cost_of,
    source_of,
    with_source,
)

STEPS = ("base", "starts", "runs")
TOTAL_BUDGET = "-total-budget"


class MethodPlan:
    """All tasks, in an order in which they can run.

    The runs see the first examples of the data, what is trained before them those that follow, and
    the reference at the total budget all of these: what any of them learns from is the same.

    Attributes:
        tasks: of all steps.
        runs: each run's task with its experiment and seed; the first experiment is the reference.
    """

    def __init__(
        self,
        options: MethodOptions,
        data: MethodDataOptions,
        experiments: list[Experiment],
        materials: Callable[[], MethodData],
        device: torch.device,
    ) -> None:
        self.options, self.data, self.materials = options, data, materials
        self.device, self.reference = device, experiments[0]
        self.root = Path(options.output_dir) / "runs"
        self._starts: dict[str, Task] = {}
        self._bases: dict[str, Task] = {}
        self.runs: list[tuple[Experiment, int, Task]] = []
        for experiment in with_total_budget(experiments, options):
            for seed in options.seeds:
                self.runs.append((experiment, seed, self._run(experiment, seed)))
        runs = [task for _, _, task in self.runs]
        self.tasks = [*self._bases.values(), *self._starts.values(), *runs]

    def _inputs(self, experiment: Experiment) -> dict[str, Any]:
        protocol = experiment.protocol
        return {
            "version": __version__,
            "protocol": asdict(protocol),
            "model_files": file_stamps(resolve_model(protocol.model_id)),
            "data": asdict(self.data),
            "data_files": [_stamped(value) for value in asdict(self.data).values()],
        }

    def _base(self, experiment: Experiment) -> Task:
        task = Task(
            step="base",
            name="base",
            inputs=self._inputs(_at_any_rate(experiment)),
            work=lambda folder: measure_base(
                folder, experiment=experiment, data=self.materials(), device=self.device
            ),
            cost=0.5 * experiment.protocol.max_steps,
            root=self.root,
        )
        return self._bases.setdefault(task.digest, task)

    def _start(self, experiment: Experiment, seed: int, kind: str) -> Task:
        options = self.options
        # One teacher for all: what the reference learns in its own way.
        source = self.reference if kind == TEACHER else experiment
        steps = options.teacher_steps if kind in TRAINED else 0
        task = Task(
            step="starts",
            name=f"{Path(kind).name}-seed{seed}",
            inputs={
                **self._inputs(source if steps else _at_any_rate(source)),
                "config": {**_plain(source), "init_lora_weights": None},
                "kind": kind,
                "seed": seed,
                "steps": steps,
                "batches": 0 if steps else options.start_batches,
                "teacher": _stamped(options.teacher) if kind == TEACHER else None,
            },
            work=lambda folder: StartMaker(
                kind, source, seed, options, self.materials(), self.device
            )(folder),
            cost=float(steps or options.start_batches),
            root=self.root,
        )
        return self._starts.setdefault(task.digest, task)

    def _run(self, experiment: Experiment, seed: int) -> Task:
        kind, base = source_of(experiment.config), self._base(experiment)
        start = self._start(experiment, seed, kind) if kind in KINDS else None

        def work(folder: Path) -> None:
            config = with_source(experiment.config, start.folder) if start else experiment.config
            cost = cost_of(start.folder) if start else None
            command = self.options.invocation
            shared = (self.materials(), base.folder, cost, command, self.device)
            MethodRun(experiment, config, seed, *shared)(folder)

        return Task(
            step="runs",
            name=f"{experiment.name.replace('/', '--')}-seed{seed}",
            inputs={
                **self._inputs(experiment),
                "config": _plain(experiment),
                "seed": seed,
                "steps": experiment.steps,
                **({"start": _stamped(kind)} if kind and not start else {}),
            },
            work=work,
            after=[base, *([start] if start else [])],
            cost=1.5 * experiment.steps,
            root=self.root,
        )


def with_total_budget(experiments: list[Experiment], options: MethodOptions) -> list[Experiment]:
    """The experiments, and the reference with as many steps as the dearest of them takes in all."""
    kinds = {source_of(experiment.config) for experiment in experiments}
    trains = kinds & set(TRAINED) if options.teacher is None else kinds & {LORI_MASK}
    if not trains:
        return experiments
    reference = experiments[0]
    longer = replace(
        reference, name=reference.name + TOTAL_BUDGET, steps_before=options.teacher_steps
    )
    return [reference, longer, *experiments[1:]]


def examples_needed(experiments: list[Experiment], options: MethodOptions) -> int:
    """Training examples that the plan reads."""
    runs = with_total_budget(experiments, options)
    return max(each.steps * each.protocol.batch_size for each in runs)


def _plain(experiment: Experiment) -> dict[str, Any]:
    """The configuration as JSON values."""
    options = experiment.config.to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in options.items()}


def _at_any_rate(experiment: Experiment) -> Experiment:
    """For what does not depend on the learning rate."""
    return replace(experiment, protocol=experiment.protocol.at_rate(0.0))


def _stamped(name: Any) -> list[Any] | None:
    """A name with the sizes and times of the files that it is of; None of anything else."""
    return [name, file_stamps(name)] if isinstance(name, str) else None
