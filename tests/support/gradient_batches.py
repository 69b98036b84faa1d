"""Batches of random tokens and the float64 gradients of a tiny model, from its definition."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_svdinit.models import linear_modules
from support.peft_fixtures import tokens


def batches(count: int, *, first_seed: int = 0, padded: bool = False) -> list[dict[str, Tensor]]:
    """Causal language modelling batches; `padded` ones end in padding without labels."""
    made = []
    for seed in range(first_seed, first_seed + count):
        ids = tokens(seed=seed)
        mask, labels = torch.ones_like(ids), ids.clone()
        if padded:
            mask[0, 5:], labels[0, 5:], labels[:, :2] = 0, -100, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def mean_gradients(
    model: nn.Module, given: Sequence[dict[str, Tensor]], targets: str | list[str] = "all-linear"
) -> dict[str, Tensor]:
    """dL/dW by autograd on trainable weights, (out, in), the mean over batches, in float64."""
    twin: Any = copy.deepcopy(model).double().eval().requires_grad_(True)
    for batch in given:
        (twin(**batch).loss / len(given)).backward()
    found = {}
    for name, linear in linear_modules(twin, targets).items():
        gradient = twin.get_submodule(name).weight.grad
        found[name] = gradient.mT if linear.transposed else gradient
    return found


def layer_inputs(
    model: nn.Module, given: Sequence[dict[str, Tensor]], mask_key: str | None = None
) -> dict[str, Tensor]:
    """All inputs of every linear layer as rows, float64; those of padding left out."""
    twin: Any = copy.deepcopy(model).double().eval()
    rows: dict[str, list[Tensor]] = {}
    keep: list[Tensor] = []

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1])[keep[-1]])

        return hook

    for name in linear_modules(twin):
        twin.get_submodule(name).register_forward_pre_hook(hook_of(name))
    for batch in given:
        counted = batch["attention_mask"].bool()
        if mask_key:
            counted &= batch[mask_key] != -100
        keep.append(counted.reshape(-1))
        with torch.no_grad():
            twin(**batch)
    return {name: torch.cat(parts) for name, parts in rows.items()}
