"""Train a LoRA from a random start, an SVD, another adapter or model, or any start of PEFT.

    accelerate launch recipes/train_lora.py --init random --output_dir runs/random
    accelerate launch recipes/train_lora.py --init svd --svd_factors runs/factors \\
        --output_dir runs/svd
    accelerate launch recipes/train_lora.py --init svd --svd_source weight \\
        --svd_start reference --svd_split balanced --output_dir runs/pissa
    accelerate launch recipes/train_lora.py --init svd --svd_source gradient \\
        --output_dir runs/gradient
    accelerate launch recipes/train_lora.py --init_from runs/random --lora_r 8 \\
        --output_dir runs/smaller
    accelerate launch recipes/train_lora.py --rank_budget 2442240 --output_dir runs/budget

The folder then holds the adapter, which stock PEFT loads, and the run's record
(`training_log.csv`, `run.json`, `loss_curve.png`), which `svdinit compare` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import (
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from stages.data_start import factors_from_data
from stages.dry_run import DryRunOptions, print_estimate
from stages.fit import Materials, check_complete, fit, outcome
from stages.lora_options import LoraOptions
from stages.processes import leave_process_group
from stages.pushing import prepare_push
from stages.rank_budget import BudgetedRanks, ranks_within_budget
from stages.resuming import check_checkpoint
from stages.skeletons import check_adapter
from stages.warm_start import moments_of_source, started_from_source
from torch.utils.data import DataLoader
from transformers import set_seed

from peft_svdinit.optim import MOMENTS_FILE_NAME
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    Run,
    completion_collator,
    load_model,
    parse_options,
    refusals_in_one_line,
)
from trainer_callbacks.adam_moments import CarryMomentsCallback, SaveMomentsCallback


def adapted(
    model: Any,
    options: LoraOptions,
    materials: Materials,
    seed: int,
    budget: BudgetedRanks | None = None,
) -> PeftModel:
    """The model with its adapter at its start; the draw depends on the seed alone."""
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)
    set_seed(seed)
    peft_model = get_peft_model(model, options.config(budget and budget.recommendation))
    if budget is not None:
        budget.check(peft_model)
    if options.init == "eva":
        loader = DataLoader(
            materials.train.select(range(min(64, len(materials.train)))),  # pyright: ignore
            batch_size=4,
            collate_fn=completion_collator(materials.tokenizer),
        )
        initialize_lora_eva_weights(peft_model, loader)
    return peft_model


def started(
    materials: Materials, model: ModelOptions, lora: LoraOptions, arguments: RecipeArguments
) -> tuple[PeftModel, list[Any], dict[str, Any]]:
    """The model at its start, the callbacks that its options ask for, and what its start cost."""
    noted: dict[str, Any] = {}
    source = lora.init_from
    if source is not None:
        lora, noted["start"] = started_from_source(model, lora, arguments)
    base = load_model(model)
    budget = None
    if lora.rank_budget is not None:
        budget = ranks_within_budget(base, lora, materials, arguments)
        noted["rank_budget"] = budget.notes
    if lora.reads_data:
        own = budget.for_start(lora) if budget else {}
        factors, cost = factors_from_data(base, lora, materials, arguments, **own)
        noted["start"] = {"source": lora.svd_source, **cost}
        lora = lora.from_factors(str(factors))
    callbacks: list[Any] = [SaveMomentsCallback()] if lora.save_moments else []
    if lora.carry_moments_from:
        callbacks.append(CarryMomentsCallback(lora.carry_moments_from))
    peft_model = adapted(base, lora, materials, arguments.seed, budget)
    if source and noted["start"]["kind"] == "adapter":
        callbacks += moments_of_source(source, peft_model, arguments)
    return peft_model, callbacks, noted


def train_lora(
    materials: Materials,
    model: ModelOptions,
    lora: LoraOptions,
    arguments: RecipeArguments,
    *,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run | None:
    """One run as the options say; its record, on the main process."""
    peft_model, callbacks, noted = started(materials, model, lora, arguments)
    extra = {**(extra or {}), **noted}
    return fit(peft_model, materials, arguments, extra=extra, callbacks=callbacks, quiet=quiet)


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, LoraOptions, RecipeArguments, DryRunOptions)
    model, data, lora, arguments, dry = parse_options(
        classes, argv, description=__doc__ or "", script=__file__
    )
    with refusals_in_one_line((model, data, lora, arguments, dry)):
        if dry.dry_run:
            return print_estimate(dry, model, data, lora, arguments)
        check_checkpoint(arguments)
        check_adapter(model, lora, arguments)
        push = prepare_push(arguments, model)
        materials = Materials.prepare(model, data)
        peft_model, callbacks, noted = started(materials, model, lora, arguments)
        run = fit(peft_model, materials, arguments, extra=noted, callbacks=callbacks)
        if run is not None:
            print(f"{outcome(run)}; adapter and record in {run.directory}")
        check_complete(Path(str(arguments.output_dir)), *([MOMENTS_FILE_NAME] * lora.save_moments))
        push(str(arguments.output_dir))


if __name__ == "__main__":
    main()
    leave_process_group()
