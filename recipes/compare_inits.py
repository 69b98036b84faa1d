"""Does an adapter that starts from a teacher's SVD beat one that starts at random?

    accelerate launch recipes/compare_inits.py
    accelerate launch recipes/compare_inits.py --config recipes/configs/compare_inits.yaml

Trains a teacher, takes its delta and SVD, trains students from every start and random ones of equal
steps and of equal total budget, for several seeds, and ends with a report. What is done already is
skipped, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState
from stages.comparison_options import ComparisonOptions, Setting, examples_per_step
from stages.comparison_plan import Plan, make_plan
from stages.dry_run import DryRunOptions, print_estimate
from stages.fit import Materials
from stages.lora_options import LoraOptions
from stages.peft_starts import check_peft_init
from stages.processes import leave_process_group
from stages.pushing import prepare_push
from stages.quiet_arguments import QuietArguments

from peft_svdinit.analysis import write_comparison
from peft_svdinit.factors import (
    CheckpointPair,
    LoraAdapter,
    check_base_of_adapter,
    factors_of_adapter,
)
from peft_svdinit.files import read_json
from peft_svdinit.models import Checkpoint, linear_modules, model_skeleton
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    Run,
    Unfinished,
    describe_environment,
    parse_options,
    read_run,
    refusals_in_one_line,
    resolve_model,
    run_tasks,
    selected_steps,
)


@dataclass
class CompareArguments(QuietArguments):
    """How to train each run: all of transformers' TrainingArguments; seeds are set by `seeds`."""

    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    output_dir: str | None = field(
        default="comparison", metadata={"help": "Folder of all runs and of the report."}
    )
    max_steps: int = field(default=6, metadata={"help": "Optimizer steps of each student."})
    eval_steps: float | None = field(
        default=3, metadata={"help": "Evaluate every so many steps (below 1: share of them)."}
    )


@dataclass(frozen=True)
class CompareDataOptions(DataOptions):
    """The data set, its columns and its split."""

    max_eval_samples: int | None = field(
        default=32, metadata={"help": "evaluate on at most so many examples, drawn at random"}
    )


def main(argv: list[str] | None = None) -> None:
    classes = (ComparisonOptions, ModelOptions, CompareDataOptions, LoraOptions, CompareArguments)
    *options, dry = parse_options(
        (*classes, DryRunOptions), argv, description=__doc__ or "", script=__file__
    )
    setting = Setting(*options)
    with refusals_in_one_line([*vars(setting).values(), dry]):
        compare(setting, dry)


def compare(setting: Setting, dry: DryRunOptions) -> None:
    """Check, run what is not done yet, and report."""
    began = time.monotonic()
    state = PartialState()
    _hush()
    steps = selected_steps(
        setting.comparison.steps,
        from_step=setting.comparison.from_step,
        to_step=setting.comparison.to_step,
        only=setting.comparison.only,
    )
    check_options(setting)
    if dry.dry_run:
        return print_estimates(dry, setting)
    with state.main_process_first():
        check_inputs(setting)
        materials = cache(lambda: Materials.prepare(setting.model, setting.data))
        materials()
    plan = make_plan(setting, materials)
    push = prepare_push(setting.arguments, setting.model) if "compare" in steps else None
    report = print if state.is_main_process else (lambda line: None)
    run_tasks(
        plan.tasks,
        steps,
        report=report,
        is_main=state.is_main_process,
        barrier=state.wait_for_everyone,
    )
    if "compare" in steps and state.is_main_process:
        write_report(setting, plan)
        print(f"Finished in {(time.monotonic() - began) / 60:.1f} minutes.")
    if push is not None:
        push(plan.shared.folder, comparison=str(setting.arguments.output_dir))


def print_estimates(dry: DryRunOptions, setting: Setting) -> None:
    """What the trainings need, on the main process: students, LoRA teachers as they, full ones."""
    model, data = setting.model, setting.data
    tasks = make_plan(setting, lambda: Materials.prepare(model, data)).tasks
    full = sum(task.step == "train_teacher" for task in tasks)
    runs = sum(task.step in ("train_random", "train_svd") for task in tasks)
    print_estimate(dry, model, data, setting.lora, setting.arguments, runs=runs)
    if full:
        print_estimate(dry, model, data, None, setting.arguments, runs=full)


def check_options(setting: Setting) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: naming the option.
    """
    options, lora = setting.comparison, setting.lora
    if setting.arguments.max_steps < 1:
        raise ValueError("max_steps must be at least 1: budgets are compared in steps")
    if setting.arguments.seed != RecipeArguments.seed:
        raise ValueError("seed is set by the comparison; use seeds")
    if lora.init != "random" or lora.init_from:
        raise ValueError(
            "init, init_from and svd_factors are set by the comparison; leave them out"
        )
    for name in options.peft_inits:
        check_peft_init("peft_inits", name, lora.lora_r)
    if lora.rank_budget is not None:
        raise ValueError(
            "rank_budget is an option of train_lora.py: the methods compared here share one rank; "
            "leave it out"
        )
    if options.taught and lora.lora_r > options.teacher_rank:
        raise ValueError(
            f"lora_r={lora.lora_r} is above teacher_rank={options.teacher_rank}, the triplets that "
            "the teacher's factors hold"
        )


def check_inputs(setting: Setting) -> None:
    """Refuse what would fail later, before anything is trained.

    Raises:
        ValueError, TypeError, OSError, ModuleNotFoundError: naming the option.
    """
    options, lora = setting.comparison, setting.lora
    base = resolve_model(setting.model.model_name_or_path)
    if Path(base).is_dir():
        Checkpoint(base, argument="model_name_or_path")
    targets = linear_modules(model_skeleton(base, "model_name_or_path"), lora.target_modules)
    if options.teacher_adapter:
        adapter = LoraAdapter(options.teacher_adapter, argument="teacher_adapter")
        if lora.check_base:
            check_base_of_teacher(adapter, base, setting.model.model_name_or_path)
        if set(adapter) != set(targets):
            differing = sorted(set(adapter) ^ set(targets))
            raise ValueError(
                f"teacher_adapter covers other layers than lora_target_modules: {differing[:5]} "
                f"and so on, {len(differing)} in all; set lora_target_modules to the adapter's"
            )
        if adapter.config["r"] < lora.lora_r:
            raise ValueError(
                f"lora_r={lora.lora_r} is above the rank of teacher_adapter, {adapter.config['r']}"
            )
    if options.teacher_model:
        CheckpointPair(
            base,
            resolve_model(options.teacher_model, "teacher_model"),
            target_modules=lora.target_modules,
            arguments=("model_name_or_path", "teacher_model"),
        )
    shapes = [(layer.out_features, layer.in_features) for layer in targets.values()]
    for name in options.peft_inits:
        check_peft_init("peft_inits", name, lora.lora_r, min(shapes, key=min))


def check_base_of_teacher(adapter: LoraAdapter, base: str, name: str) -> None:
    """Refuse an adapter of another base model.

    Raises:
        ValueError: naming both.
    """
    found = factors_of_adapter(adapter, base=base, base_argument="model_name_or_path")
    shapes = {layer: factors.shape for layer, factors in found.factors.items()}
    recorded = adapter.config.get("base_model_name_or_path")
    place = f"teacher_adapter: {adapter.folder}"
    check_base_of_adapter(recorded, (base, name), found.base_samples, shapes, place=place)


def write_report(setting: Setting, plan: Plan) -> None:
    """Compare the runs, write the report and print where everything is."""
    missing = [task.name for task in plan.compared if not task.done]
    if missing:
        raise Unfinished(f"runs to compare are not done: {', '.join(missing)}")
    runs = [read_run(task.folder) for task in plan.compared]
    output = Path(str(setting.arguments.output_dir))
    costs = start_costs(runs)
    paths = write_comparison(runs, {**_context(setting, plan), **costs}, output)
    headline = read_json(paths.numbers, "output_dir")["headline"]
    print(f"\n{headline}\n")
    print(paths.report.read_text(encoding="utf-8"))
    print(f"Page to look at:  {paths.page}")
    print(f"Report, numbers:  {paths.report}, {paths.numbers}")
    if plan.factors:
        print(f"SVD analysis:     {plan.factors[0].folder}")
    print(f"Runs, adapters:   {setting.root}")


def start_costs(runs: Sequence[Run]) -> dict[str, Any]:
    """What starts that read training data cost before their first step, by label; the mean."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.comparison and "start" in run.info["extra"]:
            found.setdefault(run.comparison["label"], []).append(run.info["extra"]["start"])
    costs = {
        label: ", ".join(
            f"{sum(each[key] for each in costs) / len(costs):,.{digits}f} {unit}"
            for key, digits, unit in (
                ("batches", 0, "batches"),
                ("tokens", 0, "tokens"),
                ("seconds", 1, "s"),
            )
        )
        for label, costs in found.items()
    }
    return {"before the first step, on top of the run": costs} if costs else {}


def _context(setting: Setting, plan: Plan) -> dict[str, Any]:
    options = setting.comparison
    rank = setting.lora.lora_r
    analyses = [
        read_json(task.folder / f"svd_analysis_rank{rank}.json", "the analysis")
        for task in plan.factors
    ]
    kept = [layer["energy_ratio"] for found in analyses for layer in found["layers"]]
    hardware = describe_environment(setting.arguments.device)["hardware"]
    accelerator = "" if hardware["device"] == "cpu" else f" and {hardware['device']}"
    synthesised = options.trains_teacher and options.teacher == "lora"
    kind = "given" if options.sunk else options.teacher
    synthesis = {"tail_decay": options.tail_decay, "noise_share": options.noise_share}
    return {
        "model": setting.model.model_name_or_path,
        "dataset": setting.data.dataset_name,
        "machine": f"{hardware['cpu_cores']} CPU cores{accelerator}",
        "student_steps": setting.arguments.max_steps,
        "teacher_steps": options.teacher_steps if options.trains_teacher else None,
        "examples_per_step": examples_per_step(setting.arguments),
        "learning_rate": None if options.sweep_lr else setting.arguments.learning_rate,
        "lora_r": rank,
        "teacher_rank": options.teacher_rank if options.taught else None,
        "teacher_kind": kind if options.taught else None,
        "synthesis": synthesis if synthesised else None,
        "energy_kept_mean": sum(kept) / len(kept) if kept else None,
        "command": setting.arguments.invocation,
    }


def _hush() -> None:
    """One line per task says enough: no bars while loading and no advice meant for PEFT itself."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
    leave_process_group()
