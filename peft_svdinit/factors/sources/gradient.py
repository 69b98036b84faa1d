"""Gradients of a loss over a few batches as a source: the first step of full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...linalg import Method
from ..low_rank import LowRankFactors
from .batches import Batch, held_batches, on_device
from .targets import (
    TargetLayer,
    first_input,
    groups_within,
    input_device,
    reading,
    target_layers,
)


def gradient_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    rank: int,
    target_modules: str | Sequence[str] = "all-linear",
    memory_gb: float = 4.0,
    method: Method = "auto",
) -> dict[str, LowRankFactors]:
    """Leading triplets of dL/dW, the mean over `batches`, for every target layer of a base model.

    The gradient of a layer is grad_outᵀ x, summed from what passes through it: no parameter gets
    a `.grad` and none has to be trainable, so that quantised bases work. Dropout is off. The step
    of gradient descent is along minus these factors, see `descent_directions`; as they are, they
    serve start="subspace", and `lora_ga_factors` makes LoRA-GA (arXiv:2407.05000) of them.

    Under ZeRO-3 and FSDP2 all processes call it with the same batches.

    Args:
        model: the base model, on the device that shall compute.
        batches: mappings of the model's arguments, labels included; as many as shall count.
        rank: triplets per layer, at most min(out, in) of a layer.
        target_modules: "all-linear", a regular expression, or names and name endings.
        memory_gb: limit of the dense float32 gradients held at a time, on the layers' device. If
            all of them need more (4 bytes per weight), layers are taken in groups and the batches
            read once per group; one layer is the least.
        method: of `truncated_svd`.

    Raises:
        ValueError: if there are no batches, one has no finite loss, processes that the model is
            split between have different ones, or the model carries an adapter.
        RuntimeError: if a layer got no gradient.

    Memory: `memory_gb`, and the inputs of the group's layers for one batch as in training (with
    gradient checkpointing those of one checkpointed block). Time: a forward and a backward pass
    per batch and group, the backward down to the group's first layer only.
    """
    layers = target_layers(model, target_modules)
    held = held_batches(batches, model)
    sizes = {name: 4 * layer.out_features * layer.in_features for name, layer in layers.items()}
    factors: dict[str, LowRankFactors] = {}
    groups = groups_within(sizes, memory_gb)
    with tqdm(
        total=len(groups) * len(held), desc="Gradients", unit="batch", disable=None
    ) as progress:
        for group in groups:
            sums = _summed_gradients(model, [layers[name] for name in group], held, progress.update)
            for name in group:
                gradient = sums.pop(name).div_(len(held))
                factors[name] = LowRankFactors.from_delta(gradient, rank, method=method)
    return factors


def _summed_gradients(
    model: nn.Module,
    group: Sequence[TargetLayer],
    batches: Sequence[Batch],
    progress: Callable[[], Any],
) -> dict[str, Tensor]:
    """Dense float32 sums over the batches, (out, in)."""
    sums: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)
    handles = [
        layer.module.register_forward_hook(_tap_hook(layer, sums, anchor), with_kwargs=True)
        for layer in group
    ]
    device = input_device(model)
    try:
        with reading(model, checkpointing=True), torch.enable_grad():
            for number, batch in enumerate(batches):
                loss = _loss(model, on_device(batch, device), number)
                if loss.requires_grad:
                    loss.backward()
                progress()
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer.name for layer in group if layer.name not in sums]
    if missing:
        raise RuntimeError(
            f"layer {missing[0]} got no gradient ({len(missing)} of {len(group)} layers): it takes "
            "no part in the loss, or the model is checkpointed reentrantly, which hides it; leave "
            "it out of target_modules, or call gradient_checkpointing_enable("
            'gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return sums


def _loss(model: nn.Module, batch: dict[str, Any], number: int) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"batches: number {number} gives no loss; it must hold labels")
    if not math.isfinite(float(loss.detach())):
        raise ValueError(
            f"batches: number {number} has a loss of {float(loss.detach())}; are all of its labels "
            "masked?"
        )
    return loss


def _tap_hook(layer: TargetLayer, sums: dict[str, Tensor], anchor: Tensor) -> Callable:
    def add(grad_out: Float[Tensor, "... out"], x: Float[Tensor, "... in"]) -> None:
        rows = grad_out.detach().float().reshape(-1, layer.out_features)
        cols = x.detach().float().reshape(-1, layer.in_features)
        if layer.name not in sums:
            sums[layer.name] = rows.mT @ cols
        else:
            sums[layer.name].addmm_(rows.mT, cols)

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return _Tap.apply(output, first_input(args, kwargs), anchor, add)  # pyright: ignore

    return hook


class _Tap(torch.autograd.Function):
    """The identity, which hands the gradient of a layer's output to `add` with the layer's input.

    The anchor requires a gradient, so that the output does where no parameter is trainable. The
    input is saved as autograd saves tensors, and hence recomputed under gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, add: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        # No view: Falcon adds to a layer's output in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(grad_outputs[0], x)
        return grad_outputs[0], None, None, None
