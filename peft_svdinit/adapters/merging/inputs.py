"""The adapters to be merged, checked against the method."""

from __future__ import annotations

import logging

from ..weighted_sum import WeightedSum
from .methods import MergeMethod

logger = logging.getLogger(__name__)


def without_zeros(given: WeightedSum, method: MergeMethod) -> tuple[WeightedSum, tuple[str, ...]]:
    """The adapters whose weight is not 0, and the others; see `merge` for what is refused."""
    pairs = list(zip(given.paths, given.weights, strict=True))
    if len(pairs) < 2:
        raise ValueError("adapters must be two at least; svdinit resize is for one")
    for path, adapter in zip(given.paths, given.adapters, strict=True):
        if adapter.style is not None or adapter.config.get("peft_type") != "LORA":
            raise ValueError(
                f"adapters must be PEFT folders of type LORA, got {path}; svdinit resize adds up "
                "adapters of other kinds"
            )
    chosen = [(path, weight) for path, weight in pairs if weight]
    if len(chosen) < (2 if method.through_peft else 1):
        raise ValueError(
            f"weights: {len(pairs) - len(chosen)} of {len(pairs)} are 0, which leaves too few "
            f"adapters for method {method.name}"
        )
    negative = [f"{path} has {weight}" for path, weight in chosen if weight < 0]
    if negative and method.elects_signs:
        raise ValueError(
            f"weights must be positive with method {method.name}, but {negative[0]}: PEFT "
            "elects the signs before it applies weights, so an adapter to be subtracted would "
            "vote as if it were added; use cat, svd or dare_linear"
        )
    _warn_of_other_bases(given)
    if len(chosen) == len(pairs):
        return given, ()
    left_out = tuple(path for path, weight in pairs if not weight)
    return WeightedSum([path for path, _ in chosen], [weight for _, weight in chosen]), left_out


def _warn_of_other_bases(given: WeightedSum) -> None:
    bases = {
        path: adapter.config.get("base_model_name_or_path")
        for path, adapter in zip(given.paths, given.adapters, strict=True)
    }
    if len(set(filter(None, bases.values()))) > 1:
        logger.warning(
            "The adapters name different base models: %s. Their shapes agree, and the merged "
            "adapter names the first; are these one model?",
            ", ".join(f"{path}: {base}" for path, base in bases.items()),
        )
