"""Whether a delta is of this base model, by entries of the weights or else by the base's name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...models import BaseSample, LinearWeights, first_difference
from ..base_weights import base_weights

# Names of a stage or a part, not of a model: they tell no model from another.
_NO_NAME = re.compile(r"|model|base|base[_-]model|merged|final|output|checkpoint-\d+")


def check_base_of_adapter(
    recorded: str | None,
    names: Sequence[str],
    samples: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    *,
    place: str,
) -> None:
    """Refuse an adapter that was trained on another base model than the one at hand.

    It stores no more of its base than a name. Where that is a checkpoint on this disk, the entries
    of the weights decide; else the last part of the name does, which a model keeps when it is
    copied or found in another's cache.

    Args:
        recorded: what the adapter calls its base.
        names: what the base at hand is called, its folder first.
        samples: entries of the base's weights by layer, see `recognition_sample`.
        shapes: (out, in) of these layers.
        place: what the message begins with: the argument and the adapter.

    Raises:
        ValueError: naming both bases.
    """
    if recorded and (recorded in names or _same_folder(recorded, names)):
        return
    difference = None
    weights = _weights_at(recorded, shapes) if recorded and samples else None
    if weights is not None:
        found = {name: BaseSample(sample) for name, sample in samples.items()}
        difference = difference_of(weights, found)
        if difference is None:
            return
        reason = f"their weights differ in {difference}"
    elif recorded and not _NO_NAME.fullmatch(_last(recorded)):
        if _last(recorded) in map(_last, names):
            return
        reason = "the names differ, and the first is not on this disk to compare the weights"
    else:
        reason = "the first tells no model from another, and is not on this disk"
    raise ValueError(
        f"{place} says that its base model is {recorded!r}, and this one is {names[-1]!r}: "
        f"{reason}; give its own base, or set check_base=False if the two are one"
    )


def check_base_of_factors(
    samples: Mapping[str, BaseSample], weights: LinearWeights, *, place: str, base: str
) -> None:
    """Refuse factors that remember entries of another base model.

    Raises:
        ValueError: naming the layer.
    """
    difference = difference_of(weights, samples)
    if difference is not None:
        raise ValueError(
            f"{place} are of another base model than {base!r}: the weights of {difference} differ; "
            "give the base that they were made of, or set check_base=False if you mean it"
        )


def check_base_of_model(
    delta: float, weights: LinearWeights, *, place: str, base: str, argument: str
) -> None:
    """Refuse a model that is further from the base than the base is from zero.

    Models trained apart of like weights are √2 of the weights' norm apart, a fine-tune of the base
    a small share of it.

    Args:
        delta: ‖tuned − base‖_F over all layers together.
        weights: of the base, in these layers.
        place: what the message begins with: the argument and the model.
        base: what the base is called.
        argument: by which the user gave the base.

    Raises:
        ValueError: with the ratio of the norms.
    """
    squares = (
        block.double().square().sum().item()
        for name in weights.names
        for _, block in weights.blocks(name)
    )
    whole = math.sqrt(math.fsum(squares))
    if delta > whole:
        ratio = f"{delta / whole:.2f}" if whole else "infinitely many"
        raise ValueError(
            f"{place} differs from {base!r} by {ratio} times the norm of its weights, as a model "
            f"of another base does; change {argument}, or set check_base=False if you mean it"
        )


def difference_of(weights: LinearWeights, samples: Mapping[str, BaseSample]) -> str | None:
    """Where a checkpoint's weights differ from samples, in words; None if nowhere."""
    return first_difference(
        (name, weights.entries(name, sample.positions(_shape(weights, name))), sample)
        for name, sample in samples.items()
    )


def _weights_at(path: str, shapes: Mapping[str, tuple[int, int]]) -> LinearWeights | None:
    """The weights of a checkpoint on this disk; None where none of such layers can be read."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    try:
        return base_weights(folder, shapes, "base")
    except (OSError, ValueError):
        return None


def _shape(weights: LinearWeights, name: str) -> tuple[int, int]:
    module = weights.modules[name]
    return module.out_features, module.in_features


def _same_folder(recorded: str, names: Sequence[str]) -> bool:
    folder = Path(recorded).expanduser()
    return folder.is_dir() and folder.resolve() in {
        Path(name).expanduser().resolve() for name in names
    }


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
