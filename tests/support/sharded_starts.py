"""What starts need of a model, taken from one that is split as from one that is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_svdinit import (
    activation_factors,
    base_samples,
    descent_directions,
    gradient_factors,
    line_search,
    weight_factors,
    weight_norms,
)
from support.gradient_batches import batches

RANK = 3


def taken(model: Any, targets: list[str]) -> dict[str, Tensor]:
    """Deltas from each source, the loss and the step of a search, and samples, by name."""
    seen, options = batches(2), {"rank": RANK, "target_modules": targets}
    sources: dict[str, Any] = {
        # So little memory that layers are taken one by one, in several passes.
        "gradient": gradient_factors(model, seen, memory_gb=1e-9, **options),
        "activation": activation_factors(model, seen, **options),
        "weighted": activation_factors(model, seen, weighting="weight", **options),
        "weight": weight_factors(model, **options),
    }
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sources["checkpointed"] = gradient_factors(model, seen, **options)
    model.gradient_checkpointing_disable()
    norms = weight_norms(model, sources["gradient"])
    directions = descent_directions(sources["gradient"], norms, rank=RANK)
    search = line_search(model, directions, seen, max_trials=3, first_step=0.1)
    # EVA's have directions alone.
    found = {
        f"{source} {name}": layer.Vh.mT @ layer.Vh if source == "activation" else layer.dense()
        for source, factors in sources.items()
        for name, layer in factors.items()
    }
    found["search"] = torch.tensor([search.step, search.loss, search.base_loss, *norms.values()])
    samples = base_samples(model, norms)
    return found | {f"sample {name}": sample for name, sample in samples.items()}


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all tensors, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in found
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Equal if and only if all bits are."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


def refusal(work: Callable[[], object]) -> str:
    """Class and message of the error that it ends with."""
    try:
        work()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def refusals_of_other_batches(model: Any, targets: list[str]) -> list[str]:
    """By the sources, of lists that differ between processes in number, numbers, or emptiness."""
    rank = dist.get_rank()
    options: dict[str, Any] = {"rank": RANK, "target_modules": targets}
    norms = weight_norms(model, weight_factors(model, **options))
    directions = descent_directions(weight_factors(model, **options), norms, rank=RANK)
    works: list[Callable[[], object]] = [
        lambda: gradient_factors(model, batches(1 + rank), **options),
        lambda: activation_factors(model, batches(1, first_seed=rank), **options),
        lambda: line_search(model, directions, batches(rank)),
    ]
    return [refusal(work) for work in works]
