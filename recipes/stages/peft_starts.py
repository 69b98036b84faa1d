"""The starts of LoRA that PEFT makes of a base alone, and whether it knows one."""

from __future__ import annotations

import re
import warnings
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from peft_svdinit.training import guess

PEFT_INITS = ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "eva")
# More iterations would take longer than the SVD that they stand for.
# Made of more than the base; what they need is not given here, and PEFT does without in silence.
_OF_DATA = ("lora_ga", "corda")
_NITER = re.compile(r"pissa_niter_\d{1,3}")


def check_peft_init(
    argument: str, name: str, rank: int, shape: tuple[int, int] | None = None
) -> None:
    """Let PEFT make a start on one small layer, so that what it refuses is known at once.

    Args:
        argument: by which the user gave it; the messages of errors begin with it.
        name: as LoraConfig's `init_lora_weights`.
        rank: of the adapter.
        shape: (out, in) of the smallest layer to adapt; without one any rank fits.

    Raises:
        ValueError: if PEFT does not know it, needs more than the base for it, or makes an adapter
            of a smaller rank of such a layer, which it then cannot load.
    """
    if shape is None or rank <= min(shape):
        rank, shape = 2 + rank % 2, (4, 4)
    fault = _fault(name, rank, shape)
    if fault is not None:
        meant = "" if name in (*PEFT_INITS, *_OF_DATA) else guess(name, PEFT_INITS)
        raise ValueError(
            f"{argument}: {name!r} is no start that PEFT makes of a base alone, as "
            f"{', '.join(PEFT_INITS)}: {fault}{meant}"
        )


@cache
def _fault(name: str, rank: int, shape: tuple[int, int]) -> str | None:
    # Aliases of this package, for tools that pass only strings.
    if name == "lori" or ":" in name:
        return "it is of this package, which has options and recipes of its own for it"
    if name in _OF_DATA:
        return "it needs gradients or inputs, which only this package's own starts are given"
    if name.startswith("pissa_niter_") and not _NITER.fullmatch(name):
        return "pissa_niter_ is followed by a number of at most three digits"
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], bias=False)})
            config = LoraConfig(r=rank, target_modules=["layer"], init_lora_weights=name)  # pyright: ignore
            inject_adapter_in_model(config, model)
    except Exception as error:  # Of any kind: PEFT looks at names where it uses them.
        return str(error)
    layer: Any = model["layer"]
    held = layer.lora_A["default"].weight.shape[0]
    if held != rank:
        return f"of a layer of {shape[0]} x {shape[1]} it makes rank {held}, not lora_r={rank}"
    return None
