"""Carrying a teacher's Adam moments over to a student that starts from its SVD.

The student's factors are another basis of the teacher's update: with A' = G A and s' B' = s B H the
chain rule gives the gradients ∇A' = Hᵀ ∇A and ∇B' = (s'/s) ∇B Gᵀ. The first moment is linear in the
gradients and is rotated exactly; the second moment is rotated as the variance of independent
entries, with the squares of the same coefficients. A direction that the teacher did not have, and
whose column of B' is zero, has no past: its first moments are zero, and its second ones the mean of
the others in the same column of A' and row of B', since of zeros Adam would make steps of several
times the learning rate so many steps after its beginning.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from ..factors import LoraProduct
from ..files import WrongKind, opened, refuse_non_floats, replacing
from ..models import lora_key

MOMENTS_FILE_NAME = "adam_moments.safetensors"
_PARTS = ("exp_avg", "exp_avg_sq")
# Share of the student's factor that the teacher's row or column space may leave unexplained.
_TOLERANCE = 1e-3
# Share of the largest column of B below which a column is rounding alone.
_NO_DIRECTION = 1e-6


@dataclass(frozen=True)
class AdamMoments:
    """Adam's state of one parameter: both moments, and the number of steps behind them."""

    exp_avg: Float[Tensor, "rows cols"]
    exp_avg_sq: Float[Tensor, "rows cols"]
    step: float


def rotated_moments(
    name: str,
    teacher: LoraProduct,
    student: LoraProduct,
    moments_A: AdamMoments,
    moments_B: AdamMoments,
) -> tuple[AdamMoments, AdamMoments]:
    """The teacher's moments of (A, B) in the basis of the student's (A', B').

    Raises:
        ValueError: if the student's factors leave the row or column space of the teacher's, so that
            no basis change connects them (a synthesised tail above the teacher's rank, say), but
            for directions whose column of B is zero.
    """
    A, B = teacher.lora_A.double(), teacher.lora_B.double()
    new_A = student.lora_A.double()
    new_B = student.lora_B.double() * (student.scaling / teacher.scaling)
    G = torch.linalg.lstsq(A.mT, new_A.mT, driver="gelsd").solution.mT
    H = torch.linalg.lstsq(B, new_B, driver="gelsd").solution
    sizes = new_B.norm(dim=0)
    held = sizes > _NO_DIRECTION * sizes.max()
    for what, found, wanted in (
        ("lora_A", (G @ A)[held], new_A[held]),
        ("lora_B", B @ H, new_B),
    ):
        if (found - wanted).norm() > _TOLERANCE * wanted.norm():
            raise ValueError(
                f"layer {name}: the student's {what} is not within the span of the teacher's, so "
                "its Adam moments cannot be carried over; use a student rank no higher than the "
                "teacher adapter's"
            )
    of_A = _applied(H.mT, moments_A, 1.0)
    of_B = _applied(G, moments_B, student.scaling / teacher.scaling, from_right=True)
    if not held.all():
        for old, new in (
            (moments_A.exp_avg_sq, of_A.exp_avg_sq),
            (moments_B.exp_avg_sq.mT, of_B.exp_avg_sq.mT),
        ):
            new[~held] = (new[held] if held.any() else old).mean(dim=0)
    return of_A, of_B


def _applied(
    matrix: Tensor, moments: AdamMoments, factor: float, *, from_right: bool = False
) -> AdamMoments:
    def rotated(coefficients: Tensor, moment: Tensor) -> Tensor:
        wide = moment.double()
        product = wide @ coefficients.mT if from_right else coefficients @ wide
        return product.to(moment.dtype)

    matrix = matrix * factor
    return AdamMoments(
        rotated(matrix, moments.exp_avg), rotated(matrix.square(), moments.exp_avg_sq), moments.step
    )


def lora_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """Trainable LoRA weights by the key they have in a saved adapter."""
    infix = f".{adapter_name}."
    return {
        name.replace(infix, "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and infix in name and (".lora_A." in name or ".lora_B." in name)
    }


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether `save_moments` will find moments of matrices; None if that cannot be told yet."""
    found = state_of_a_matrix(optimizer)
    return None if found is None else _has_moments(*found)


def state_of_a_matrix(
    optimizer: torch.optim.Optimizer,
) -> tuple[Mapping[str, Any], Tensor] | None:
    """What the optimizer keeps of a matrix, and that matrix; None if it cannot be told yet.

    An optimizer that has not stepped is asked by a step of another of its class and options, on a
    matrix of its own.
    """
    for parameter, state in optimizer.state.items():
        if parameter.dim() == 2:
            return state, parameter
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros(2, 2)
    try:
        twin = type(optimizer)([probe], **options)
        twin.step()
    except Exception:  # of a class that takes other arguments, or works on one device only
        return None
    return twin.state.get(probe, {}), probe


def _has_moments(state: Mapping[str, Any], parameter: Tensor) -> bool:
    return all(part in state and state[part].shape == parameter.shape for part in _PARTS)


def save_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, path: str | os.PathLike
) -> Path:
    """Write the Adam moments of a model's LoRA weights, keyed as in the saved adapter.

    Raises:
        TypeError: if the optimizer keeps no `exp_avg` and `exp_avg_sq` of full size.
    """
    tensors = {}
    for key, parameter in lora_parameters(model).items():
        state = optimizer.state.get(parameter, {})
        if not _has_moments(state, parameter):
            raise WrongKind(
                f"{key}: the optimizer keeps no Adam moments for it; carrying moments over needs "
                "optim=adamw_torch or adamw_torch_fused"
            )
        for part in _PARTS:
            tensors[f"{key}.{part}"] = state[part].detach().float().cpu().contiguous()
        tensors[f"{key}.step"] = torch.as_tensor(float(state["step"]))
    target = Path(path)
    with replacing(target) as temporary:
        save_file(tensors, temporary)
    return target


def load_moments(path: str | os.PathLike) -> dict[str, AdamMoments]:
    """Moments by adapter key, as `save_moments` wrote them.

    Raises:
        ValueError: if the file is no safetensors file, truncated, or lacks one of the moments.
        TypeError: if one is no floating-point number.
    """
    with opened(Path(path), "moments") as file:
        refuse_non_floats(file, file.keys())
        keys = [key.removesuffix(".step") for key in file.keys() if key.endswith(".step")]
        return {
            key: AdamMoments(
                exp_avg=file.get_tensor(f"{key}.exp_avg"),
                exp_avg_sq=file.get_tensor(f"{key}.exp_avg_sq"),
                step=file.get_tensor(f"{key}.step").item(),
            )
            for key in keys
        }


def install_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    teacher: Mapping[str, LoraProduct],
    moments: Mapping[str, AdamMoments],
    scalings: Mapping[str, float],
) -> int:
    """Start the optimizer's state of every LoRA layer from the teacher's rotated moments.

    Args:
        optimizer: an AdamW that has not stepped yet.
        model: the student, with its adapter "default" at its start.
        teacher: the teacher's adapter, by module name.
        moments: its moments, by adapter key.
        scalings: the student's scaling, by module name.

    Returns:
        The number of layers whose moments were carried over.

    Raises:
        ValueError: if a layer of the student has no moments, or as `rotated_moments` raises;
            nothing is changed then.
    """
    parameters = lora_parameters(model)
    carried: dict[str, AdamMoments] = {}
    for name, scaling in scalings.items():
        key_A, key_B = (lora_key(name, "A"), lora_key(name, "B"))
        if name not in teacher or key_A not in moments or key_B not in moments:
            raise ValueError(f"layer {name}: the teacher's files hold no Adam moments for it")
        student = LoraProduct(parameters[key_A].detach(), parameters[key_B].detach(), scaling)
        carried[key_A], carried[key_B] = rotated_moments(
            name, teacher[name], student, moments[key_A], moments[key_B]
        )
    # As torch places it: these kernels read the step on the device.
    on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    for key, state in carried.items():
        parameter = parameters[key]
        device = parameter.device if parameter in on_device else None
        optimizer.state[parameter] = {
            "step": torch.tensor(state.step, dtype=torch.float32, device=device),
            "exp_avg": state.exp_avg.to(parameter),
            "exp_avg_sq": state.exp_avg_sq.to(parameter),
        }
    return len(scalings)
