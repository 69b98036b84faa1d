"""How far to go along given deltas: a short search on batches that the gradient did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm.auto import tqdm

from ...models import from_first_process
from ..low_rank import LowRankFactors
from .batches import Batch, held_batches, on_device
from .targets import (
    TargetLayer,
    first_input,
    input_device,
    named_layers,
    reading,
)


@dataclass(frozen=True)
class LineSearch:
    """The best step found, and every one tried."""

    step: float
    loss: float
    base_loss: float
    tried: tuple[tuple[float, float], ...]
    """(step, loss) in order of the steps."""


def line_search(
    model: nn.Module,
    directions: Mapping[str, LowRankFactors],
    batches: Iterable[Batch],
    *,
    first_step: float = 5e-4,
    factor: float = 2.0,
    max_trials: int = 12,
) -> LineSearch:
    """The step s that minimises the mean loss of `base + s * directions` over held-out batches.

    From `first_step` on the step is multiplied or divided by `factor` as long as the loss falls,
    which brackets a minimum within that factor if the loss has one along the line. The deltas are
    added in the forward pass as products of thin matrices; the weights are not touched.

    Under ZeRO-3 and FSDP2 all processes call it with the same batches.

    Args:
        model: the base model.
        directions: as `descent_directions` gives them; steps are in units of each weight's norm.
        batches: mappings of the model's arguments, labels included; not those of the gradient,
            on which every small step helps.
        first_step: where to begin.
        factor: ratio of neighbouring steps, above 1.
        max_trials: evaluations at most, that of the base not counted.

    Raises:
        ValueError: if an argument is out of range, or processes that the model is split between
            have different batches.
        RuntimeError: if no step tried lowers the loss.

    Time: a forward pass per batch and trial, about five trials if `first_step` is near.
    """
    if not (0 < first_step < math.inf and 1 < factor < math.inf and max_trials >= 2):
        raise ValueError(
            "first_step must be positive, factor above 1 and max_trials at least 2, got "
            f"{first_step}, {factor} and {max_trials}"
        )
    held = held_batches(batches, model)
    layers = named_layers(model, directions)
    losses: dict[int, float] = {}
    with tqdm(total=max_trials + 1, desc="Line search", unit="step", disable=None) as progress:

        def loss_at(power: int | None) -> float:
            step = 0.0 if power is None else first_step * factor**power
            loss = _mean_loss(model, layers, directions, step, held)
            progress.update()
            return loss

        base = loss_at(None)
        losses[0] = loss_at(0)
        losses[-1] = loss_at(-1)
        # Away from the worse neighbour, or towards the base, where small steps have to help.
        direction = -1 if losses[-1] <= losses[0] or losses[0] >= base else 1
        while len(losses) < max_trials:
            last = min(losses) if direction < 0 else max(losses)
            losses[last + direction] = loss_at(last + direction)
            improving = losses[last + direction] < losses[last]
            if not improving and min(losses.values()) < base:
                break
    best = min(losses, key=lambda power: losses[power])
    tried = tuple((first_step * factor**power, losses[power]) for power in sorted(losses))
    if not losses[best] < base:
        raise RuntimeError(
            f"no step from {tried[0][0]:.2g} to {tried[-1][0]:.2g} of the weights' norms lowers "
            f"the held-out loss of {base:.4f}; use more batches for the gradient, or a smaller "
            "first_step"
        )
    return LineSearch(first_step * factor**best, losses[best], base, tried)


@torch.no_grad()
def _mean_loss(
    model: nn.Module,
    layers: Mapping[str, TargetLayer],
    directions: Mapping[str, LowRankFactors],
    step: float,
    batches: Sequence[Batch],
) -> float:
    handles = [
        layer.module.register_forward_hook(_adding(directions[name], step), with_kwargs=True)
        for name, layer in layers.items()
        if step
    ]
    device = input_device(model)
    total = 0.0
    try:
        with reading(model):
            for number, batch in enumerate(batches):
                loss = getattr(model(**on_device(batch, device)), "loss", None)
                if loss is None:
                    raise ValueError(f"batches: number {number} gives no loss; it must hold labels")
                total += float(loss)
    finally:
        for handle in handles:
            handle.remove()
    # One loss for all processes, or they might part: some to another trial, others to the end.
    mean = from_first_process(model, total / len(batches))
    if not step and not math.isfinite(mean):
        raise ValueError(
            f"batches: the base model's mean loss is {mean}; are all labels of a batch masked?"
        )
    return mean if math.isfinite(mean) else math.inf


def _adding(delta: LowRankFactors, step: float) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = first_input(args, kwargs)
        change = linear(linear(x, delta.Vh.to(x)), (delta.U * (step * delta.S)).to(x))
        return output + change.to(output.dtype)

    return hook
