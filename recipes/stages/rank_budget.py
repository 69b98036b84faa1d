"""Ranks within a budget of parameters, from what a few batches of a run's training data say."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from peft_svdinit import (
    FactorsFile,
    LowRankFactors,
    activation_factors,
    gradient_factors,
    recommend_ranks,
    relative_spectra,
)
from peft_svdinit.analysis import analyze, plot_heat_maps
from peft_svdinit.factors import HasSpectrum, RankRecommendation, Spectrum, target_layers
from peft_svdinit.files import file_stamps, read_json, write_json
from peft_svdinit.training import RecipeArguments
from peft_svdinit.tuner import lora_scalings
from stages.data_start import FOLDER, counted
from stages.fit import Materials
from stages.lora_options import LoraOptions
from stages.processes import is_shared
from stages.resuming import checkpoint_to_resume

RANKS, FIGURE = "ranks.json", "ranks.png"
# No layer gets more than this many times the rank that the budget pays for everywhere: as many
# triplets have to be computed and held, and past it few batches tell little about more directions.
MOST_OVER_UNIFORM = 4
_MEASURED = {
    "gradient": ("energy of the mean gradient", "the mean gradient"),
    "activation": ("variance of the layers' inputs", "inputs of the layers, each of norm 1"),
}


@dataclass(frozen=True)
class BudgetedRanks:
    """Ranks of the layers, the same on all processes.

    Attributes:
        recommendation: the ranks and what they hold.
        notes: for the run's record: what was asked for and what it cost.
        measured: the factors that the ranks were read from, where they were just computed.
    """

    recommendation: RankRecommendation
    notes: dict[str, Any]
    measured: Mapping[str, LowRankFactors] | None

    def for_start(self, options: LoraOptions) -> dict[str, Any]:
        """What `factors_from_data` takes: the ranks, and the factors if the source is the same."""
        same = options.svd_source == options.rank_budget_from
        return {"ranks": self.recommendation.ranks, "measured": self.measured if same else None}

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if the adapter has layers that no spectrum was taken of."""
        strange = [name for name in lora_scalings(model) if name not in self.recommendation.ranks]
        if strange:
            raise ValueError(
                f"rank_budget covers linear layers, and {strange[0]} ({len(strange)} such) of "
                "lora_target_modules is none; leave it out"
            )


def ranks_within_budget(
    model: Any, options: LoraOptions, materials: Materials, arguments: RecipeArguments
) -> BudgetedRanks:
    """The ranks in the run's folder, found unless they are there, and one line about them.

    Triplets are taken in the order of σ_i² / (out + in) over all layers, see `recommend_ranks`. Of
    gradients σ_i² is that of the mean gradient, in which the scales of layers count: a step along
    its triplet i lowers the loss by σ_i² times its size, to first order. Of activations it is the
    share of the variance of a layer's own inputs, as in EVA (arXiv:2410.07170), see
    `relative_spectra`. Both say where directions are, and neither how much training gains there.

    `start/ranks.json` holds the ranks with what they capture, `start/ranks.png` the figure that
    `svdinit analyze` draws. The main process finds them, or all together where each holds a part of
    the model; a resumed run with the same options and data reads them.

    Raises:
        ValueError: if the budget does not pay for rank 1 in every layer, or no layer matches.
    """
    is_main = PartialState().is_main_process
    measured = None
    folder = Path(str(arguments.output_dir)) / FOLDER
    batches = list(islice(materials.batches(arguments.train_batch_size), options.init_batches))
    wanted = {
        **_asked(options),
        "model": [model.name_or_path, file_stamps(model.name_or_path)],
        "factors": options.svd_factors and file_stamps(options.svd_factors),
        "data": _digest(batches),
    }
    content = _told(_stored(folder / RANKS, wanted) if is_main else None)
    if content is None:
        if checkpoint_to_resume(arguments) and (folder / RANKS).is_file():
            raise ValueError(
                f"rank_budget: the run in {arguments.output_dir} has the ranks of "
                f"{folder / RANKS}, and an option, the model or the data that they depend on has "
                "changed since; choose another output_dir"
            )
        # Before anything is computed: this is where a small budget is refused.
        most = _highest_ranks(model, options)
        shared = is_shared(model)
        if shared or is_main:
            if not (shared or getattr(model, "is_quantized", False)):
                model.to(arguments.device)
            with counted(model) as cost:
                measured = _measured(model, options, batches, max(most.values()))
            if is_main:
                found = _written(folder, _spectra(measured, options, most), options, len(batches))
                config = found.config_options(
                    scaling=options.scaling, use_rslora=options.use_rslora
                )
                content = {"options": wanted, "cost": cost, **found.as_dict(), "config": config}
                write_json(folder / RANKS, content)
        content = _told(content)
    assert content is not None
    if is_main:
        print(_line(content, options), flush=True)
    names = [entry.name for entry in fields(RankRecommendation)]
    noted = ("max_parameters", "parameters", "energy", "uniform_energy", "limit")
    notes = {"from": options.rank_budget_from, **content["cost"]}
    notes.update({name: content[name] for name in noted})
    ranks = RankRecommendation(**{name: content[name] for name in names})
    return BudgetedRanks(ranks, notes, measured)


def _told(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the main process has, on all of them."""
    told = [content]
    broadcast_object_list(told)
    return told[0]


def _written(
    folder: Path, spectra: Mapping[str, Spectrum], options: LoraOptions, batches: int
) -> RankRecommendation:
    """The ranks for these spectra, and the figure of both."""
    found = recommend_ranks(spectra, max_parameters=options.rank_budget)
    held = min(len(layer.S) for layer in spectra.values())
    analysis = analyze(spectra, max(1, min(held, round(found.uniform_rank))))
    title = f"Δ: {_MEASURED[options.rank_budget_from][1]}, {batches} batches"
    folder.mkdir(parents=True, exist_ok=True)
    plot_heat_maps(analysis, folder / FIGURE, ranks=found.ranks, title=title)
    return found


def _asked(options: LoraOptions) -> dict[str, Any]:
    """The options that the file depends on."""
    names = (
        "rank_budget", "rank_budget_from", "init_batches", "lora_target_modules", "use_rslora",
        "init", "svd_source", "svd_start", "svd_factors", "scaling",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}


def _digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """Tells what the batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(batch[name].numpy().tobytes())
    return digest.hexdigest()


def _stored(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = read_json(path, "the ranks")
    except ValueError:  # Of another program, or damaged: it is written anew.
        return None
    # As JSON has them.
    return content if content.get("options") == json.loads(json.dumps(wanted)) else None


def parameters_of_rank_one(shapes: Mapping[str, tuple[int, int]], budget: int) -> int:
    """What rank 1 costs in all layers of these (out, in) shapes.

    Raises:
        ValueError: if the budget does not pay for it.
    """
    once = {name: Spectrum(torch.ones(1), 1.0, shape) for name, shape in shapes.items()}
    return recommend_ranks(once, max_parameters=budget).parameters


def _highest_ranks(model: Any, options: LoraOptions) -> dict[str, int]:
    """The most that each layer may get."""
    layers = target_layers(model, options.target_modules)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    budget = options.rank_budget or 0
    cap = math.ceil(MOST_OVER_UNIFORM * budget / parameters_of_rank_one(shapes, budget))
    most = {name: min(*shape, cap) for name, shape in shapes.items()}
    if options.init == "svd" and options.svd_source == "teacher":
        factors = FactorsFile(options.svd_factors or "", argument="svd_factors")
        held = {name: factors.rank_of(name) for name in factors}
        most = {name: min(rank, held.get(name, rank)) for name, rank in most.items()}
    if _is_lora_ga(options):
        # Which takes A and B from different triplets.
        most = {name: max(1, min(rank, min(shapes[name]) // 2)) for name, rank in most.items()}
    return most


def _is_lora_ga(options: LoraOptions) -> bool:
    return options.reads_data and (options.svd_source, options.svd_start) == (
        "gradient",
        "reference",
    )


def _measured(
    model: nn.Module, options: LoraOptions, batches: Sequence[Mapping[str, Any]], rank: int
) -> dict[str, LowRankFactors]:
    targets = options.target_modules
    if options.rank_budget_from == "activation":
        return activation_factors(model, batches, rank=rank, target_modules=targets)
    triplets = 2 * rank if _is_lora_ga(options) else rank
    return gradient_factors(model, batches, rank=triplets, target_modules=targets)


def _spectra(
    measured: Mapping[str, LowRankFactors], options: LoraOptions, most: Mapping[str, int]
) -> dict[str, Spectrum]:
    """What the ranks are read from: energies of gradients as they are, of inputs as shares."""
    spectra: Mapping[str, HasSpectrum] = measured
    if options.rank_budget_from == "activation":
        spectra = relative_spectra(measured)
    return {
        name: Spectrum(layer.S[: most[name]], layer.norm, layer.shape)
        for name, layer in spectra.items()
    }


def _line(content: Mapping[str, Any], options: LoraOptions) -> str:
    ranks, measure = content["ranks"].values(), _MEASURED[options.rank_budget_from][0]
    spent = f"{content['parameters']:,} of {options.rank_budget:,} parameters"
    # More of a budget is left than one triplet costs where no layer may get more.
    full = "" if content["limit"] == "budget" else ", the most that any layer may have"
    return (
        f"rank_budget: {spent} in {len(ranks)} layers of rank {min(ranks)} to {max(ranks)}{full}; "
        f"{content['energy']:.1%} of the {measure}, where rank {content['uniform_rank']:.1f} "
        f"everywhere holds {content['uniform_energy']:.1%}"
    )
