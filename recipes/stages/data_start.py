"""Factors that a start takes from a few batches of a run's own training data, and their cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from peft_svdinit import (
    FactorsFile,
    FactorsMetadata,
    LowRankFactors,
    activation_factors,
    base_samples,
    descent_directions,
    gradient_factors,
    line_search,
    lora_ga_factors,
    save_factors,
    scaled,
    weight_norms,
)
from peft_svdinit.factors import FACTORS_FILE_NAME
from peft_svdinit.files import file_stamps
from peft_svdinit.training import RecipeArguments
from stages.fit import Materials
from stages.lora_options import LoraOptions
from stages.processes import is_shared

FOLDER = "start"


def factors_from_data(
    model: Any,
    options: LoraOptions,
    materials: Materials,
    arguments: RecipeArguments,
    *,
    ranks: Mapping[str, int] | None = None,
    measured: Mapping[str, LowRankFactors] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The factors file in the run's folder, made unless it is there, and what it cost.

    A resumed run finds the file, and so starts from the same factors. One process makes it, or all
    of them together where each holds a part of the model. With `ranks` each layer has the triplets
    of its own rank; factors of the same source over the first `init_batches`, `measured` to find
    these ranks, are not computed again.
    """
    folder = Path(str(arguments.output_dir)) / FOLDER
    size = arguments.train_batch_size
    wanted = {"kind": options.svd_source, "batch_size": size, **options.start_options}
    wanted["model"] = file_stamps(model.name_or_path)
    if ranks is not None:
        wanted["ranks"] = dict(ranks)
    shared = is_shared(model)
    alone = arguments.main_process_first(local=False, desc="factors from data")
    with nullcontext() if shared else alone:
        if (folder / FACTORS_FILE_NAME).is_file():
            source = FactorsFile(folder).metadata.source
            if source.get("options") == wanted:
                return folder, source["cost"]
        if not (shared or getattr(model, "is_quantized", False)):
            model.to(arguments.device)
        with counted(model) as cost:
            batches = iter(materials.batches(size))
            factors, notes = _factors(model, options, batches, ranks or options.lora_r, measured)
        source = {"kind": options.svd_source, "options": wanted, "cost": cost, **notes}
        metadata = FactorsMetadata(
            base_model_name_or_path=getattr(model, "name_or_path", None), source=source
        )
        samples = base_samples(model, factors)
        if not shared or arguments.process_index == 0:
            save_factors(folder, factors, metadata, base_samples=samples)
    if shared:
        PartialState().wait_for_everyone()
    return folder, cost


def _factors(
    model: nn.Module,
    options: LoraOptions,
    batches: Iterator[dict[str, Any]],
    ranks: int | Mapping[str, int],
    measured: Mapping[str, LowRankFactors] | None,
) -> tuple[dict[str, LowRankFactors], dict[str, Any]]:
    """Factors for the start that the options describe, and what is worth noting of them."""
    targets = options.target_modules
    rank = ranks if isinstance(ranks, int) else max(ranks.values())
    searches = options.svd_source == "gradient" and options.svd_start == "delta"
    seen = list(islice(batches, options.init_batches * (2 if searches else 1)))
    held_out = [seen.pop() for _ in range(len(seen) // 2)] if searches else []
    if searches and not held_out:
        raise ValueError(
            "svd_source=gradient with svd_start=delta needs two batches of training data, one for "
            f"the gradient and one for the step's size, and there are {len(seen)}"
        )
    if len(seen) < options.init_batches:  # Not those of `measured`, if some were held out.
        measured = None
    if options.svd_source == "activation":
        factors = measured or activation_factors(
            model,
            seen,
            rank=rank,
            weighting=options.activation_weighting,  # pyright: ignore[reportArgumentType]
            part=options.svd_part,  # pyright: ignore[reportArgumentType]
            target_modules=targets,
        )
        return _cut(factors, ranks), {}
    triplets = 2 * rank if options.svd_start == "reference" else rank
    gradients = measured or gradient_factors(model, seen, rank=triplets, target_modules=targets)
    if options.svd_start == "subspace":
        return _cut(gradients, ranks), {}
    if options.svd_start == "reference":
        return lora_ga_factors(gradients, rank=ranks, scaling=options.scaling), {}
    directions = descent_directions(
        gradients,
        weight_norms(model, gradients),
        rank=ranks,
        form=options.gradient_form,  # pyright: ignore[reportArgumentType]
    )
    search = line_search(model, directions, held_out)
    return scaled(directions, search.step), {"step": search.step, "tried": search.tried}


def _cut(
    factors: Mapping[str, LowRankFactors], ranks: int | Mapping[str, int]
) -> dict[str, LowRankFactors]:
    """Without the triplets beyond the ranks of the layers."""
    if isinstance(ranks, int):
        return dict(factors)
    return {name: layer.truncated(ranks[name]) for name, layer in factors.items()}


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Batches and tokens that pass through the model, and the seconds it takes."""
    cost: dict[str, Any] = {"batches": 0, "tokens": 0, "seconds": 0.0}

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cost["batches"] += 1
        cost["tokens"] += int(kwargs["attention_mask"].sum())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    began = time.perf_counter()
    try:
        yield cost
    finally:
        handle.remove()
        cost["seconds"] = round(time.perf_counter() - began, 3)
