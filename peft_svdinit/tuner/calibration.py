"""What a calibration run says about each entry of B: read off a model with a LoRI-D adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import GradientScores, Scores
from .adapter_layers import lora_layers, module_name
from .layers.parts import lora_linears
from .layers.sparse_factor import SparseFactor


def dense_factors(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The dense, trained B of every layer of an adapter, by module name.

    Raises:
        ValueError: if the model has no such adapter, or its B is sparse already.
    """
    factors = {}
    for path, layer in lora_layers(model, adapter_name):
        name, part_B = module_name(path), lora_linears(layer, adapter_name)[1]
        if isinstance(part_B, SparseFactor):
            raise ValueError(
                f"layer {name}: B is sparse, and a mask is chosen among all of its entries; "
                "calibrate with LoriConfig(lori_density=1)"
            )
        factors[name] = part_B.weight
    if not factors:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoRA layer of that name")
    return factors


def input_sizes(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Columns of the A of every layer of an adapter, by module name."""
    return {
        module_name(path): layer.in_features or 0
        for path, layer in lora_layers(model, adapter_name)
    }


def gradients_of(factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of all B.

    Raises:
        RuntimeError: if one has none.
    """
    return _complete({name: factor.grad for name, factor in factors.items()})


def gradient_scores(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> Scores:
    """|Σ ∂loss/∂B| over batches, without training: a mask for no calibration run.

    Args:
        model: with a LoRI-D adapter at its start, where the gradients are those of the base model
            seen through A.
        batches: what the model is called with, labels included, as tensors.

    Raises:
        ValueError: as `dense_factors`, or if a loss is not finite.
        RuntimeError: if there is no batch, or a B gets no gradient: the adapter is frozen or not
            the active one.
    """
    factors = dense_factors(model, adapter_name)
    for name, factor in factors.items():
        if not factor.requires_grad:
            raise RuntimeError(f"layer {name}: lora_B is frozen; load it with is_trainable=True")
    device = next(iter(factors.values())).device
    totals = GradientScores(weighted=False)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            loss = model(**inputs).loss
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of a batch is {loss.item()}; its gradients say nothing")
            totals.add(factors, _gradients_of_loss(loss, factors))
    finally:
        model.train(was_training)
    return totals.scores()


def _gradients_of_loss(loss: Tensor, factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return _complete(dict.fromkeys(factors))
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return _complete(dict(zip(factors, found, strict=True)))


def _complete(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    found = {}
    for name, gradient in gradients.items():
        if gradient is None:
            raise RuntimeError(f"layer {name}: lora_B has no gradient; is the adapter active?")
        found[name] = gradient
    return found
