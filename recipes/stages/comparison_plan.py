"""The tasks of `compare_inits.py`: which runs, in which order, from which inputs."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from train_full_teacher import train_full_teacher
from train_lora import train_lora

from peft_svdinit import __version__
from peft_svdinit.analysis import write_teacher
from peft_svdinit.factors import (
    CheckpointPair,
    LoraAdapter,
    Synthesis,
    factors_of_adapter,
    factors_of_checkpoints,
)
from peft_svdinit.files import file_stamps
from peft_svdinit.optim import MOMENTS_FILE_NAME
from peft_svdinit.training import Task, Unfinished, read_run, resolve_model
from stages.comparison_options import Setting, examples_per_step
from stages.fit import Materials, check_complete
from stages.lora_options import LoraOptions
from stages.starts import CELLS, METHODS

_MOMENTS = "svd_delta_moments"
_LABELS = {
    "random": "random start",
    "random_total": "random start, total budget",
    _MOMENTS: "SVD start (delta) + Adam moments",
    "eva": "EVA",
    **{method: cell.label for method, cell in METHODS.items()},
}


@dataclass(frozen=True)
class Plan:
    """Tasks in an order in which they can run, and which of them the comparison reads.

    Attributes:
        shared: whose adapter `push_to_hub` pushes: the first start's at the first seed.
    """

    tasks: list[Task]
    compared: list[Task]
    factors: list[Task]
    shared: Task


def make_plan(setting: Setting, materials: Callable[[], Materials]) -> Plan:
    """All tasks of a comparison; `materials` is called when the first of them trains."""
    planner = _Planner(setting, materials)
    options = setting.comparison
    compared: list[Task] = []
    factors: dict[int, Task] = {}
    for seed in options.seeds if options.taught else ():
        factors[seed] = planner.factors(seed)
    methods = ["random", "random_total"] if options.trains_teacher else ["random"]
    methods += [CELLS[start].method for start in options.starts]
    methods += [_MOMENTS] if options.carry_moments else []
    for method in [*methods, *options.peft_inits]:
        sweep = [
            planner.run(method, options.seeds[0], factors.get(options.seeds[0]), rate, sweep=True)
            for rate in options.sweep_lr
        ]
        compared += sweep
        for seed in options.seeds:
            rate = None if sweep else setting.arguments.learning_rate
            compared.append(planner.run(method, seed, factors.get(seed), rate, after=sweep))
    order = {step: position for position, step in enumerate(options.steps)}
    tasks = sorted([*planner.tasks, *compared], key=lambda task: order[task.step])
    first = [*(CELLS[start].method for start in options.starts), *options.peft_inits, "random"][0]
    shared = next(t for t in compared if t.name == f"{first}-seed{options.seeds[0]}")
    distinct = {task.folder: task for task in factors.values()}
    return Plan(tasks, compared, list(distinct.values()), shared)


class _Planner:
    def __init__(self, setting: Setting, materials: Callable[[], Materials]) -> None:
        self.setting = setting
        self.options = setting.comparison
        self.materials = materials
        self.inputs = setting.inputs
        self.tasks: list[Task] = []
        self._teachers: dict[int, Task] = {}

    def teacher(self, seed: int) -> Task:
        """The training of the teacher of one seed."""
        full = self.options.teacher == "full"
        rate = self.options.teacher_learning_rate or (
            5e-5 if full else self.setting.arguments.learning_rate
        )
        lora = dataclasses.replace(
            self.setting.lora, init="random", save_moments=self.options.carry_moments
        )
        steps = self.options.teacher_steps
        task = Task(
            step="train_teacher" if full else "train_random",
            name=f"teacher-seed{seed}",
            inputs={
                **self.inputs,
                "teacher": self.options.teacher,
                "lora": None if full else asdict(lora),
                "steps": steps,
                "learning_rate": rate,
                "seed": seed,
            },
            work=partial(
                self._train,
                lora=lambda: None if full else lora,
                steps=steps,
                rate=lambda: rate,
                seed=seed,
                first_step=0,
                evaluate=False,
            ),
            cost=steps * (2.0 if full else 1.0),
            collective=True,
            root=self.setting.root,
        )
        self._teachers[seed] = task
        self.tasks.append(task)
        return task

    def factors(self, seed: int) -> Task:
        """The factors of the teacher of one seed; of a given teacher the same for all."""
        options = self.options
        given = options.teacher_adapter or options.teacher_model
        after = [] if given else [self.teacher(seed)]
        synthesised = not options.sunk and options.teacher == "lora"
        task = Task(
            step="synthesize" if synthesised else "extract",
            name="factors" if given else f"factors-seed{seed}",
            inputs={
                "version": __version__,
                "rank": options.teacher_rank,
                "tail": [options.tail_decay, options.noise_share] if synthesised else None,
                "analysed_at": self.setting.lora.lora_r,
                "teacher": given,
                "teacher_files": file_stamps(given) if given else None,
                "base_files": self.inputs["model_files"],
                "seed": None if given else seed,
            },
            work=partial(self._extract, seed=seed, plots=seed == options.seeds[0]),
            after=after,
            cost=2.0,
            root=self.setting.root,
        )
        self.tasks.append(task)
        return task

    def run(
        self,
        method: str,
        seed: int,
        factors: Task | None,
        rate: float | None,
        *,
        sweep: bool = False,
        after: list[Task] | None = None,
    ) -> Task:
        """One run of a method; with `rate` None at the best rate of the sweep runs `after`."""
        needs = list(after or [])
        taught = method == _MOMENTS or (method in METHODS and METHODS[method].taught)
        teacher = self._teachers.get(seed)
        needs += [task for task in (factors, teacher) if taught and task]
        steps = self.setting.arguments.max_steps
        total = method == "random_total"
        teacher_steps = self.options.teacher_steps if self.options.trains_teacher else 0
        steps += teacher_steps if total else 0
        suffix = f"-lr{rate:g}" if sweep and rate is not None else ""
        return Task(
            step="train_random" if method in ("random", "random_total") else "train_svd",
            name=f"{method}-seed{seed}{suffix}",
            inputs={
                **self.inputs,
                "method": method,
                "lora": asdict(self.setting.lora),
                "steps": steps,
                "learning_rate": rate,
                "sweep": sweep,
                "seed": seed,
            },
            work=partial(
                self._train,
                lora=lambda: self._lora(method, factors, teacher),
                steps=steps,
                rate=lambda: rate if rate is not None else best_rate(after or []),
                seed=seed,
                first_step=0 if total else teacher_steps,
                about=lambda chosen: {
                    "method": method,
                    "label": _LABELS.get(method, f"{method} (PEFT)"),
                    "budget": "total" if total else "student",
                    "learning_rate": chosen,
                    "sweep": sweep,
                    "teacher": self._cost(teacher) if taught else None,
                },
            ),
            after=needs,
            cost=float(steps),
            collective=True,
            root=self.setting.root,
        )

    def _lora(self, method: str, factors: Task | None, teacher: Task | None) -> LoraOptions:
        lora = self.setting.lora
        if method in ("random", "random_total"):
            return dataclasses.replace(lora, init="random")
        moments = method == _MOMENTS
        cell = CELLS["delta"] if moments else METHODS.get(method)
        if cell is None:
            return dataclasses.replace(lora, init=method)
        return dataclasses.replace(
            lora,
            init="svd",
            svd_factors=str(factors.folder) if cell.taught and factors else None,
            carry_moments_from=str(teacher.folder) if moments and teacher else None,
            **cell.options,
        )

    def _cost(self, teacher: Task | None) -> dict[str, Any]:
        if teacher is None:
            return {"kind": "given", "steps": 0, "tokens": 0, "seconds": 0.0, "sunk": True}
        info = read_run(teacher.folder).info
        kind = "full" if self.options.teacher == "full" else "synthesised"
        cost = {key: info[key] for key in ("steps", "tokens", "seconds")}
        return {"kind": kind, **cost, "sunk": False}

    def _train(
        self,
        folder: Path,
        *,
        lora: Callable[[], LoraOptions | None],
        steps: int,
        rate: Callable[[], float],
        seed: int,
        first_step: int,
        evaluate: bool = True,
        about: Callable[[float], Mapping[str, Any]] | None = None,
    ) -> None:
        """Train on the examples of steps `first_step` and on, in the seed's order.

        The teacher has the first ones, every student those after them, and the random run of the
        same total budget both: the same examples in the same order, whatever is compared.
        """
        chosen = rate()
        per_step = examples_per_step(self.setting.arguments)
        materials = self.materials().part(seed, first_step * per_step, steps * per_step)
        arguments = dataclasses.replace(
            self.setting.arguments,
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=chosen,
            seed=seed,
            train_sampling_strategy="sequential",
            resume_from_checkpoint="last",
            push_to_hub=False,
        )
        if not evaluate:
            arguments = dataclasses.replace(arguments, eval_strategy="no", eval_on_start=False)
        extra = {"comparison": dict(about(chosen))} if about else None
        adapter = lora()
        if adapter is None:
            train_full_teacher(materials, self.setting.model, arguments, extra=extra, quiet=True)
        else:
            train_lora(materials, self.setting.model, adapter, arguments, extra=extra, quiet=True)
        check_complete(folder, *([MOMENTS_FILE_NAME] if adapter and adapter.save_moments else []))
        gc.collect()
        if arguments.process_index == 0:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def _extract(self, folder: Path, *, seed: int, plots: bool) -> None:
        options, rank = self.options, self.setting.lora.lora_r
        base = resolve_model(self.setting.model.model_name_or_path)
        given_model = options.teacher_model
        if options.teacher == "full" and not options.sunk:
            given_model = str(self._teachers[seed].folder)
        if given_model:
            pair = CheckpointPair(
                base, resolve_model(given_model), target_modules=self.setting.lora.target_modules
            )
            extraction = factors_of_checkpoints(
                pair, options.teacher_rank, base_model_name_or_path=base
            )
            uncovered = {tensor.key: tensor.relative_change for tensor in pair.uncovered()}
            write_teacher(
                extraction, folder, rank=rank, notes={"uncovered": uncovered}, plots=plots
            )
            return
        adapter = LoraAdapter(options.teacher_adapter or self._teachers[seed].folder)
        synthesis = None
        if not options.sunk:
            synthesis = Synthesis(
                options.teacher_rank, options.tail_decay, options.noise_share, seed
            )
        extraction = factors_of_adapter(adapter, synthesis=synthesis, base=base)
        original = {name: adapter[name].factors() for name in adapter} if plots else None
        write_teacher(
            extraction, folder, rank=rank, original=original if synthesis else None, plots=plots
        )


def best_rate(sweep: list[Task]) -> float:
    """The learning rate of the sweep run with the lowest final evaluation loss."""
    runs = [read_run(task.folder) for task in sweep]
    finite = [run for run in runs if (run.final_eval_loss or float("nan")) < float("inf")]
    if not finite:
        raise Unfinished(f"every run of the sweep diverged: {', '.join(r.name for r in runs)}")
    best = min(finite, key=lambda run: run.final_eval_loss or 0.0)
    return best.info["extra"]["comparison"]["learning_rate"]
