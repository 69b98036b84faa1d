"""Parameters of an optimizer that others take the place of, in its groups and in its state.

A training that switches layers replaces their parameters while it runs. An optimizer left alone
would go on with the old ones and never see the new: without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..files import WrongKind

StateHandling = Literal["project", "drop"]
STATE_HANDLINGS: tuple[StateHandling, ...] = get_args(StateHandling)
# Running means of gradients, and of their squares: what a change of basis is defined for.
_FIRST, _SECOND = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "square_avg")
_COUNTS = ("step", "mu_product")

Moments = Sequence[Tensor]


@dataclass(frozen=True)
class Moved:
    """Parameters `new` in place of `old`, which may be the same objects with other entries.

    Attributes:
        name: of the layer, for errors.
        old, new: in this order `carry` takes and gives moments.
        carry: moments of the gradients of `old` to those of `new`. Called with True, it maps means
            of squares: as variances of independent entries, with its coefficients squared.
        vectors: those of `new` that weight decay is not for.
    """

    name: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    carry: Callable[[Moments, bool], Moments]
    vectors: tuple[nn.Parameter, ...] = ()


def replace_parameters_(
    optimizer: torch.optim.Optimizer,
    order: Sequence[nn.Parameter],
    moved: Sequence[Moved],
    *,
    state: StateHandling = "project",
    spared: Collection[nn.Parameter] = (),
) -> None:
    """Put new parameters where the old ones were: same group, the order that a model gives.

    That order is the one in which a resumed run builds its groups, and by which a saved state finds
    its parameters. Vectors go into the group without weight decay where there is one: one of the
    same learning rate, all of whose parameters are among `spared`. The state of parameters that are
    not replaced stays.

    Args:
        optimizer: the optimizer itself, not a wrapper.
        order: all parameters of the model as it is now.
        moved: what took whose place. Frozen parameters need no group.
        state: "project" carries the moments over, "drop" begins anew.
        spared: parameters that weight decay is not for.

    Raises:
        TypeError: if a state cannot be carried over; nothing is changed then.
        ValueError: if a trained parameter is in no group.
    """
    groups = optimizer.param_groups
    places = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    staying = {id(p) for each in moved for p in each.new}
    leaving = {id(p) for each in moved for p in each.old} - staying
    exempt = {id(p) for p in spared} | leaving
    joining: dict[int, int] = {}
    carried: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for each in moved:
        trained = [p for p in each.old if p.requires_grad]
        missing = [p for p in trained if id(p) not in places]
        if missing:
            raise ValueError(
                f"layer {each.name}: the optimizer does not hold its parameters, so that those of "
                "low rank would never be trained"
            )
        held = [p for p in each.old if id(p) in places]
        if not held:
            continue
        home = places[id(held[0])]
        for parameter in each.new:
            vector = any(parameter is other for other in each.vectors)
            if parameter.requires_grad or not trained:
                joining[id(parameter)] = _undecayed(groups, home, exempt) if vector else home
        if state == "project":
            carried += _carried(optimizer, each)
    rank_of = {id(p): position for position, p in enumerate(order)}
    arriving = [p for each in moved for p in each.new if id(p) not in places]
    for index, group in enumerate(groups):
        members = [p for p in group["params"] if id(p) not in leaving]
        members += [p for p in arriving if joining.get(id(p)) == index]
        group["params"] = sorted(members, key=lambda p: rank_of.get(id(p), len(rank_of)))
    for each in moved:
        for parameter in each.old:
            optimizer.state.pop(parameter, None)
    for parameter, found in carried:
        optimizer.state[parameter] = found


def check_can_carry(
    optimizer: torch.optim.Optimizer, names: Collection[str], argument: str = "optimizer_state"
) -> None:
    """Refuse an optimizer whose state of a matrix has these entries, if one cannot be carried.

    `argument` is by which the user asked for it.

    Raises:
        TypeError: naming optimizer, entry and remedy.
    """
    unknown = sorted(set(names) - {*_FIRST, *_SECOND, *_COUNTS})
    if unknown:
        raise WrongKind(
            f"{argument}=project: the state of {type(optimizer).__name__} has "
            f"{', '.join(unknown)}, which no change of basis is defined for; use an Adam (without "
            f"amsgrad) or SGD of torch, or {argument}=drop"
        )


def _carried(
    optimizer: torch.optim.Optimizer, moved: Moved
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    states = [optimizer.state.get(parameter) or {} for parameter in moved.old]
    if not any(states):
        return []  # No step was taken yet.
    found: list[dict[str, Any]] = [{} for _ in moved.new]
    names = list(states[0])
    check_can_carry(optimizer, names)
    if any(list(state) != names for state in states):
        raise WrongKind(f"layer {moved.name}: its parameters have states of different kinds")
    for name in names:
        values = [state[name] for state in states]
        if name in _COUNTS:
            for state in found:
                state[name] = _copy(values[0])
            continue
        if values[0] is None:  # SGD without momentum.
            for state in found:
                state[name] = None
            continue
        shapes = [tuple(value.shape) for value in values]
        if shapes != [tuple(parameter.shape) for parameter in moved.old]:
            raise WrongKind(
                f"layer {moved.name}: {name} of {type(optimizer).__name__} is {shapes[0]} for a "
                f"weight of {tuple(moved.old[0].shape)}, so that it cannot be carried over; use "
                "optimizer_state=drop"
            )
        for parameter, state, value in zip(
            moved.new, found, moved.carry(values, name in _SECOND), strict=True
        ):
            state[name] = value.to(values[0].dtype).reshape(parameter.shape).contiguous()
    return list(zip(moved.new, found, strict=True))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _undecayed(groups: Sequence[Mapping[str, Any]], home: int, exempt: Collection[int]) -> int:
    """The group without weight decay, of the rate of `home`, all of whose ids are exempt."""
    for index, group in enumerate(groups):
        members = {id(parameter) for parameter in group["params"]}
        same_rate = group.get("lr") == groups[home].get("lr")
        if (
            index != home
            and not group.get("weight_decay")
            and same_rate
            and members.issubset(exempt)
        ):
            return index
    return home
