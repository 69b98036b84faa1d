"""The tasks of `compare_inits.py`: which runs, in which order, from which inputs."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fit import Materials
from train_full_teacher import train_full_teacher
from train_lora import LoraOptions, train_lora

from peft_svdinit import __version__
from peft_svdinit.deltas import CheckpointPair, LoraAdapter, Synthesis
from peft_svdinit.embedded import resolve_model
from peft_svdinit.extraction import factors_of_adapter, factors_of_checkpoints
from peft_svdinit.pipeline import Task
from peft_svdinit.runs import read_run
from peft_svdinit.sources import file_stamps
from peft_svdinit.teacher_files import write_teacher
from peft_svdinit.training import DataOptions, ModelOptions, RecipeArguments

_LABELS = {
    "random": "random start",
    "random_total": "random start, total budget",
    "svd_delta": "SVD start (delta)",
    "svd_delta_moments": "SVD start (delta) + Adam moments",
    "svd_subspace": "SVD directions only (subspace)",
    "svd_reference": "SVD start, function preserved (reference)",
    "eva": "EVA",
}

# Options of the training arguments that say where and how loudly, not what is computed.
_NOT_INPUTS = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level",
    "log_level_replica", "resume_from_checkpoint", "save_total_limit", "project",
    "trackio_space_id", "push_to_hub", "local_rank", "max_steps", "learning_rate", "seed",
    "data_seed", "expected_processes", "train_sampling_strategy",
}  # fmt: skip


@dataclass(frozen=True)
class ComparisonOptions:
    """The comparison: which teacher, which starts, which seeds, which steps of the pipeline."""

    _argument_group_name = "comparison"

    teacher: str = field(
        default="lora",
        metadata={
            "help": "lora: train a random-init LoRA and synthesise a teacher from it; full: train "
            "all parameters and take the delta."
        },
    )
    teacher_adapter: str | None = field(
        default=None, metadata={"help": "An existing LoRA as the teacher; its cost counts as sunk."}
    )
    teacher_model: str | None = field(
        default=None,
        metadata={"help": "An existing full fine-tune as the teacher; its cost counts as sunk."},
    )
    teacher_steps: int = field(default=8, metadata={"help": "Optimizer steps of the teacher."})
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the teacher: learning_rate for lora, 5e-5 for full."}
    )
    teacher_rank: int = field(default=64, metadata={"help": "Rank of the teacher's factors."})
    tail_decay: float = field(
        default=0.1, metadata={"help": "Synthesis: decay per appended singular value."}
    )
    noise_share: float = field(
        default=0.1, metadata={"help": "Synthesis: share of the appended energy that is noise."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "One set of runs for each."}
    )
    starts: list[str] = field(
        default_factory=lambda: ["delta", "subspace"],
        metadata={"help": "SVD starts to compare: delta, subspace, reference."},
    )
    peft_inits: list[str] = field(
        default_factory=lambda: ["pissa_niter_4"],
        metadata={"help": "PEFT's own starts to compare, such as pissa_niter_4, olora, eva."},
    )
    carry_moments: bool = field(
        default=False,
        metadata={"help": "Also a delta start that goes on with the teacher's Adam moments."},
    )
    sweep_lr: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates of which every method gets its best, on the first seed."},
    )
    from_step: str | None = field(
        default=None, metadata={"help": "First step to run, by name or number."}
    )
    to_step: str | None = field(default=None, metadata={"help": "Last step to run."})
    only: str | None = field(default=None, metadata={"help": "The one step to run."})

    def __post_init__(self) -> None:
        if self.teacher not in ("lora", "full"):
            raise ValueError(f"teacher must be lora or full, got {self.teacher!r}")
        if self.teacher_adapter and self.teacher_model:
            raise ValueError("teacher_adapter and teacher_model exclude each other")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be different and at least one, got {self.seeds}")
        unknown = set(self.starts) - {"delta", "subspace", "reference"}
        if unknown or not self.starts:
            raise ValueError(f"starts must be of delta, subspace, reference, got {self.starts}")
        if self.carry_moments and (self.sunk or self.teacher != "lora"):
            raise ValueError("carry_moments needs a LoRA teacher that is trained here")
        if self.teacher_steps < 1:
            raise ValueError(f"teacher_steps must be at least 1, got {self.teacher_steps}")
        Synthesis(self.teacher_rank, self.tail_decay, self.noise_share)

    @property
    def sunk(self) -> bool:
        """Whether the teacher exists already."""
        return bool(self.teacher_adapter or self.teacher_model)

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the pipeline's steps."""
        if self.sunk:
            return ("extract", "train_random", "train_svd", "compare")
        if self.teacher == "full":
            return ("train_teacher", "extract", "train_random", "train_svd", "compare")
        return ("train_random", "synthesize", "train_svd", "compare")


@dataclass(frozen=True)
class Setting:
    """All options of a comparison."""

    comparison: ComparisonOptions
    model: ModelOptions
    data: DataOptions
    lora: LoraOptions
    arguments: RecipeArguments

    @property
    def root(self) -> Path:
        return Path(str(self.arguments.output_dir)) / "runs"

    @property
    def inputs(self) -> dict[str, Any]:
        """What every task depends on."""
        arguments = self.arguments.to_dict()
        return {
            "version": __version__,
            "model": asdict(self.model),
            "model_files": file_stamps(resolve_model(self.model.model_name_or_path)),
            "data": asdict(self.data),
            "data_files": file_stamps(self.data.dataset_name),
            "arguments": {
                key: value
                for key, value in arguments.items()
                if key not in _NOT_INPUTS and not key.startswith(("hub_", "push_"))
            },
            "processes": self.arguments.world_size,
        }


@dataclass(frozen=True)
class Plan:
    """Tasks in an order in which they can run, and which of them the comparison reads."""

    tasks: list[Task]
    compared: list[Task]
    factors: list[Task]


def make_plan(setting: Setting, materials: Callable[[], Materials]) -> Plan:
    """All tasks of a comparison; `materials` is called when the first of them trains."""
    planner = _Planner(setting, materials)
    options = setting.comparison
    compared: list[Task] = []
    factors: dict[int, Task] = {}
    for seed in options.seeds:
        factors[seed] = planner.factors(seed)
    methods = ["random"] if options.sunk else ["random", "random_total"]
    methods += [f"svd_{start}" for start in options.starts]
    methods += ["svd_delta_moments"] if options.carry_moments else []
    for method in [*methods, *options.peft_inits]:
        sweep = [
            planner.run(method, options.seeds[0], factors[options.seeds[0]], rate, sweep=True)
            for rate in options.sweep_lr
        ]
        compared += sweep
        for seed in options.seeds:
            rate = None if sweep else setting.arguments.learning_rate
            compared.append(planner.run(method, seed, factors[seed], rate, after=sweep))
    order = {step: position for position, step in enumerate(options.steps)}
    tasks = sorted([*planner.tasks, *compared], key=lambda task: order[task.step])
    return Plan(tasks, compared, list({task.folder: task for task in factors.values()}.values()))


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
        factors: Task,
        rate: float | None,
        *,
        sweep: bool = False,
        after: list[Task] | None = None,
    ) -> Task:
        """One run of a method; with `rate` None at the best rate of the sweep runs `after`."""
        needs = list(after or [])
        svd = method.startswith("svd_")
        needs += [factors] if svd else []
        teacher = self._teachers.get(seed)
        needs += [teacher] if svd and teacher else []
        steps = self.setting.arguments.max_steps
        total = method == "random_total"
        teacher_steps = 0 if self.options.sunk else self.options.teacher_steps
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
                    "teacher": self._cost(teacher) if svd else None,
                },
            ),
            after=needs,
            cost=float(steps),
            collective=True,
            root=self.setting.root,
        )

    def _lora(self, method: str, factors: Task, teacher: Task | None) -> LoraOptions:
        lora = self.setting.lora
        if method in ("random", "random_total"):
            return dataclasses.replace(lora, init="random")
        if not method.startswith("svd_"):
            return dataclasses.replace(lora, init=method)
        moments = method.endswith("_moments")
        return dataclasses.replace(
            lora,
            init="svd",
            svd_factors=str(factors.folder),
            svd_start=method.removeprefix("svd_").removesuffix("_moments"),
            carry_moments_from=str(teacher.folder) if moments and teacher else None,
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
        )
        extra = {"comparison": dict(about(chosen))} if about else None
        adapter = lora()
        if adapter is None:
            train_full_teacher(materials, self.setting.model, arguments, extra=extra, quiet=True)
        else:
            train_lora(materials, self.setting.model, adapter, arguments, extra=extra, quiet=True)
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
                base, given_model, target_modules=self.setting.lora.target_modules
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


def examples_per_step(arguments: RecipeArguments) -> int:
    """Examples behind one optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def best_rate(sweep: list[Task]) -> float:
    """The learning rate of the sweep run with the lowest final evaluation loss."""
    runs = [read_run(task.folder) for task in sweep]
    finite = [run for run in runs if (run.final_eval_loss or float("nan")) < float("inf")]
    if not finite:
        raise RuntimeError(f"every run of the sweep diverged: {', '.join(r.name for r in runs)}")
    best = min(finite, key=lambda run: run.final_eval_loss or 0.0)
    return best.info["extra"]["comparison"]["learning_rate"]
