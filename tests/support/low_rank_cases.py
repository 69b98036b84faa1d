"""Layers of low rank, and models with some, beside dense twins."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_svdinit.low_rank import LowRankLinear, LowRankRule, factorize_, make_plan
from peft_svdinit.low_rank.factorising import Switched
from support.strategies import seeds


def random_layer(
    out: int,
    inner: int,
    rank: int,
    *,
    bias: bool = True,
    norms: bool = False,
    transposed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LowRankLinear:
    """A layer of random parameters; norms are of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    vectors = {"row_norm": drawn(out), "sv_norm": drawn(rank)} if norms else {}
    return LowRankLinear(
        drawn(out, rank),
        drawn(rank, inner),
        nn.Parameter(drawn(out)) if bias else None,
        **vectors,
        transposed=transposed,
    )


@st.composite
def random_layers(draw: st.DrawFn) -> LowRankLinear:
    """Float64 layers of all shapes, ranks and kinds; the rank may be above min(out, in)."""
    out, inner, rank = (draw(st.integers(1, 9)) for _ in range(3))
    bias, norms, transposed = (draw(st.booleans()) for _ in range(3))
    return random_layer(
        out, inner, rank, bias=bias, norms=norms, transposed=transposed, seed=draw(seeds)
    )


def product_of(layer: LowRankLinear, parts: dict[str, Tensor] | None = None) -> Tensor:
    """diag(D) U diag(S) Vh from its definition, (out, in); differentiable."""
    named = dict(layer.named_parameters()) if parts is None else parts
    product = named["U"]
    if "sv_norm" in named:
        product = torch.diag(named["row_norm"]) @ product @ torch.diag(named["sv_norm"])
    return product @ named["Vh"]


def switch(model: nn.Module, *, ratio: float = 0.25, step: int = 2, **options: Any):
    """Make all layers that may be of low rank; `options` are those of `factorize_`."""
    plan = make_plan(model, LowRankRule(ratio=ratio, multiple_of=step))
    return factorize_(model, plan, **options)


def dense_twin(before: nn.Module, switched: list[Switched]) -> Any:
    """A copy of the model of before whose layers have the products as weights."""
    twin: Any = copy.deepcopy(before)
    for each in switched:
        module = twin.get_submodule(each.name)
        product = product_of(each.layer).detach()
        module.weight.data = (product.mT if each.layer.transposed else product).contiguous()
    return twin


def changed(model: nn.Module) -> None:
    """As training leaves it: factors are of no SVD any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.02 * noise.to(parameter)


def same_layers(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )
