"""PEFT's method comparison (MetaMathQA) for starts of LoRA and for LoRI, on any model and device.

    python recipes/method_comparison.py
    python recipes/method_comparison.py --config recipes/configs/method_comparison_embedded.yaml

Trains every experiment folder with every seed as PEFT's own runner does, measures greedy answers
and forgetting, and the untrained start besides; teachers and calibrations are made here, and their
cost stands beside the row. The first experiment is the reference; where others had a training
before, it is also run at the total budget. The same command again skips what is done. The folder
then holds `method_comparison.md`, `method_comparison.json` and, in `results`, a JSON for each run
that PEFT's tables read.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from stages.method_data import MethodData
from stages.method_options import MethodDataOptions, MethodOptions
from stages.method_plan import STEPS, MethodPlan, examples_needed
from stages.method_protocol import Experiment, read_experiment
from stages.method_report import write_report
from stages.method_runs import RESULT
from stages.method_starts import TEACHER, check_experiment, check_teacher, source_of
from stages.metric_modules import metric
from stages.processes import leave_process_group

from peft_svdinit.files import read_json, write_json
from peft_svdinit.training import (
    Unfinished,
    describe_environment,
    parse_options,
    refusals_in_one_line,
    run_tasks,
    selected_steps,
)


def main(argv: list[str] | None = None) -> None:
    options, data = parse_options(
        (MethodOptions, MethodDataOptions), argv, description=__doc__ or "", script=__file__
    )
    with refusals_in_one_line((options, data)):
        compare(options, data)


def compare(options: MethodOptions, data: MethodDataOptions) -> None:
    """Check, run what is not done yet, and report."""
    began = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = torch.device(PartialState().device or "cpu")
    steps = selected_steps(STEPS, from_step=None, to_step=None, only=options.only)
    if PartialState().num_processes > 1:
        raise ValueError("the protocol is of one process; start this without a launcher")
    experiments = read_experiments(options)
    check_starts(experiments, options)
    metric("exact_match")
    needed = examples_needed(experiments, options)
    materials = cache(lambda: MethodData.prepare(data, experiments[0].protocol, needed))
    materials()
    plan = MethodPlan(options, data, experiments, materials, device)
    try:
        run_tasks(plan.tasks, steps, report=print)
    except Unfinished as error:
        raise Unfinished(str(error).replace("from_step=", "--only ")) from error
    if STEPS[-1] not in steps:
        return
    output = Path(options.output_dir)
    results = []
    for experiment, seed, task in plan.runs:
        results.append(read_json(task.folder / RESULT, "the result"))
        name = f"{experiment.name.replace('/', '--')}--seed{seed}.json"
        write_json(output / "results" / name, results[-1])
    protocol = experiments[0].protocol
    environment = describe_environment(device)
    context = {
        "model": f"{protocol.model_id} in {protocol.dtype}",
        "data": f"{data.dataset_name}, {protocol.max_steps} steps of {protocol.batch_size}",
        "steps of teacher and calibration": "given" if options.teacher else options.teacher_steps,
        "forgetting on": f"{data.general_dataset_name}, {data.general_samples} texts at most",
        "machine": environment["hardware"],
        "versions": environment["versions"],
        "command": options.invocation,
    }
    print(f"\n{write_report(results, context, output)}")
    print(f"Table, numbers and results in {output}; adapters in {plan.root}")
    print(f"Finished in {(time.monotonic() - began) / 60:.1f} minutes.")


def read_experiments(options: MethodOptions) -> list[Experiment]:
    """The experiments chosen, at their learning rates.

    Raises:
        ValueError: for an unknown one, or one that differs from the others in more than its rate.
    """
    root, defaults = Path(options.experiments_dir), options.defaults
    found = [read_experiment(root, name, defaults) for name in options.experiments]
    scaled = [
        Experiment(each.name, each.config, each.protocol.at_rate(options.rate_factor))
        for each in found
    ]
    first = scaled[0].protocol
    for each in scaled:
        for name in ("model_id", "query_template", "max_seq_length", "batch_size", "max_steps"):
            if getattr(each.protocol, name) != getattr(first, name):
                raise ValueError(
                    f"experiments: {each.name} has another {name} than {scaled[0].name}, so that "
                    "their rows could not be compared; compare it apart"
                )
    return scaled


def check_starts(experiments: list[Experiment], options: MethodOptions) -> None:
    """Refuse starts that cannot be made, before anything is trained.

    Raises:
        ValueError, OSError, TypeError: naming the option.
    """
    taught = [each for each in experiments if source_of(each.config) == TEACHER]
    if options.teacher is not None and not taught:
        raise ValueError(f"teacher is of no use to experiments={options.experiments}; leave it out")
    for each in experiments:
        check_experiment(each)
    for each in taught:
        if options.teacher is not None:
            check_teacher(options.teacher, each)
        elif each.config.r > experiments[0].config.r:
            raise ValueError(
                f"experiments: {each.name} has r={each.config.r}, above that of the teacher, which "
                f"is trained as {experiments[0].name} with r={experiments[0].config.r}"
            )


if __name__ == "__main__":
    main()
    leave_process_group()
