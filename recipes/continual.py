"""Learn a second task on top of a first, and measure what of the first is forgotten.

    python recipes/continual.py
    accelerate launch recipes/continual.py --config recipes/configs/continual.yaml

For each scheme of `--schemes` and each of `--seeds`, stage one trains an adapter on task one and
stage two goes on with task two; both tasks are evaluated before and after each stage. Every scheme
trains for as many steps on the same examples (shared: with both of its parts); what calibrations
take comes on top and is reported. The same command again skips what is done and goes on where it
was killed. The folder then holds `continual.md` with the table, `continual.png` and
`continual.json`.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from stages.continual_options import (
    ContinualArguments,
    ContinualDataOptions,
    ContinualOptions,
    ContinualSetting,
)
from stages.continual_plan import Plan
from stages.fit import Materials
from stages.lori_options import SparseOptions
from stages.lori_stages import check_selection, target_layers
from stages.processes import leave_process_group

from peft_svdinit.analysis import write_continual
from peft_svdinit.training import (
    ModelOptions,
    parse_options,
    refusals_in_one_line,
    run_tasks,
    said_of,
)


def main(argv: list[str] | None = None) -> None:
    classes = (
        ContinualOptions, ModelOptions, ContinualDataOptions, SparseOptions, ContinualArguments
    )  # fmt: skip
    options = parse_options(classes, argv, description=__doc__ or "", script=__file__)
    with refusals_in_one_line(options):
        learn(ContinualSetting(*options))


def learn(setting: ContinualSetting) -> None:
    """Check, run what is not done yet, and report."""
    began = time.monotonic()
    state = PartialState()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    materials = cache(lambda: materials_of(setting))
    with state.main_process_first():
        layers = target_layers(setting.model, setting.sparse)
        mask = check_selection(layers, setting.sparse, seed=0)
        if "lori_exclude" in setting.continual.schemes:
            check_selection(layers, setting.sparse, seed=0, exclude=[mask])
        materials()
    plan = Plan(setting, materials)
    run_tasks(
        plan.tasks,
        ("calibrate", "mask", "train"),
        report=print if state.is_main_process else (lambda line: None),
        is_main=state.is_main_process,
        barrier=state.wait_for_everyone,
    )
    if not state.is_main_process:
        return
    learnt = setting.continual
    context = {
        "model": setting.model.model_name_or_path,
        "task one": learnt.first_dataset_name,
        "task two": learnt.second_dataset_name,
        "evaluation examples": [len(each.evaluation) for each in materials().values()],
        "rank": setting.sparse.lora_r,
        "density": setting.sparse.lori_density,
        "learning rates": {"lora": learnt.lora_learning_rate, "lori": learnt.lori_learning_rate},
        "command": setting.arguments.invocation,
    }
    output = Path(str(setting.arguments.output_dir))
    report = write_continual([each.stages() for each in plan.schemes], context, output)
    print(f"\n{report.read_text(encoding='utf-8')}")
    print(f"Report, figure, numbers in {output}; runs and adapters in {setting.root}")
    print(f"Finished in {(time.monotonic() - began) / 60:.1f} minutes.")


def materials_of(setting: ContinualSetting) -> dict[str, Materials]:
    """Of each task; what is wrong with its data set is said of its own option."""
    found = {}
    for task, data in setting.data_of.items():
        with said_of("dataset_name", f"{task}_dataset_name"):
            found[task] = Materials.prepare(setting.model, data)
    return found


if __name__ == "__main__":
    main()
    leave_process_group()
