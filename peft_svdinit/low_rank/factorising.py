"""Dense layers of a model become layers of low rank, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..factors import held_batches, input_covariances, named_layers
from ..optim import Moved
from .approximation import Approximation, RowNormalise, approximation
from .basis import split
from .candidates import Candidate, low_rank_layers, replace_module_
from .layer import LowRankLinear
from .moments import to_dense, to_factors
from .plan import LowRankPlan
from .planning import check_plan
from .saving import save_dense_


@dataclass(frozen=True)
class Switched:
    """One layer that became of low rank.

    Attributes:
        name: its full name.
        layer: what took its place.
        error: ‖W − U Vh‖_F / ‖W‖_F.
        moved: the weight and the parameters in its place, for the optimizer.
    """

    name: str
    layer: LowRankLinear
    error: float
    moved: Moved


@torch.no_grad()
def factorize_(
    model: nn.Module,
    plan: LowRankPlan,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    row_normalise: RowNormalise = "none",
    train_norms: bool = False,
    memory_gb: float = 4.0,
) -> list[Switched]:
    """Put layers of low rank in the place of those that the plan names, in place.

    Biases stay the parameters that they are, and factors have the dtype and device of the weight. A
    `save_pretrained` of the model writes an ordinary dense checkpoint from now on, with the factors
    beside it (see `load_low_rank`).

    Args:
        model: a dense model; its optimizer has to be told (`peft_svdinit.optim`).
        plan: layers and ranks.
        batches: mappings of the model's arguments. With them each layer is approximated in what it
            computes on their inputs, without them in its entries. Weights of pretrained models are
            of nearly full rank: give them a few batches.
        row_normalise: "norms" or "sums" weigh rows by their size, see `approximation`.
        train_norms: keep D and S as parameters of their own in place of folding them into U and Vh.
        memory_gb: limit of the second moments held at a time, with `batches`.

    Raises:
        ValueError: if the plan is not for this model, the model is of low rank already or carries
            an adapter, a layer is tied to another, or an option is unknown. Nothing is changed.
        RuntimeError: if a layer is given no input by the batches.

    Cost: an SVD for each layer; with `batches` a forward pass for each batch too.
    """
    chosen = check_plan(model, plan)
    layers = plan.layers
    found: dict[str, Approximation] = {}
    with tqdm(total=len(layers), desc="Low rank", unit="layer", disable=None) as progress:
        for name, weight, moments in _weights(model, chosen, batches, memory_gb):
            found[name] = approximation(
                weight, layers[name].rank, moments=moments, row_normalise=row_normalise
            )
            progress.update()
    switched = [_put(model, name, found[name], train_norms) for name in layers]
    save_dense_(model)
    return switched


@torch.no_grad()
def densify_(model: nn.Module) -> list[Moved]:
    """Put dense layers in the place of all that are of low rank; what took whose place."""
    moved = []
    for name, layer in low_rank_layers(model).items():
        dense = layer.dense()
        replace_module_(model, layer, dense)
        moved.append(to_dense(name, layer, dense.weight))  # pyright: ignore[reportArgumentType]
    return moved


def _weights(
    model: nn.Module,
    chosen: Mapping[str, Candidate],
    batches: Iterable[Mapping[str, Any]] | None,
    memory_gb: float,
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, weight as (out, in) in float32, second moments of its inputs or None)."""
    if batches is None:
        for name, candidate in chosen.items():
            yield name, candidate.weight(), None
        return
    for sharing, moments in input_covariances(
        model,
        named_layers(model, chosen),
        held_batches(batches, model),
        centred=False,
        positions="attended",
        memory_gb=memory_gb,
    ):
        for layer in sharing:
            yield layer.name, layer.weight(), moments


def _put(model: nn.Module, name: str, found: Approximation, train_norms: bool) -> Switched:
    module = model.get_submodule(name)
    weight: nn.Parameter = module.weight  # pyright: ignore[reportAssignmentType]
    bias: nn.Parameter | None = getattr(module, "bias", None)
    norms = {}
    if train_norms:
        U, Vh = found.U, found.Vh
        rows = U.new_ones(len(U)) if found.D is None else found.D
        norms = {"row_norm": _as(rows, weight), "sv_norm": _as(found.S, weight)}
    else:
        U, Vh = split(found.U, found.S, found.Vh)
        U = U if found.D is None else U * found.D[:, None]
    transposed = isinstance(module, Conv1D)
    layer = LowRankLinear(_as(U, weight), _as(Vh, weight), bias, **norms, transposed=transposed)
    layer.train(module.training)
    replace_module_(model, module, layer)
    return Switched(name, layer, found.error, to_factors(name, weight, layer))


def _as(tensor: Tensor, weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor.to(weight), weight.requires_grad)
