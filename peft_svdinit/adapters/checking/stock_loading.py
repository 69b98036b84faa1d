"""Loading an adapter as PEFT does where this package is not installed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from torch import nn

from ...files import TensorFile
from ...models import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    model_skeleton,
    read_adapter_config,
    refuse_endless_patterns,
)

# A task type of another class of models is an AttributeError, a missing head a KeyError.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
_REFUSALS += (RuntimeError, TypeError, ValueError)


@contextmanager
def _stock_tuner() -> Iterator[None]:
    present = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = present


class _Weightless(nn.Parameter):
    """A parameter whose deep copy shares its number, where torch would allocate the shape."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weightless:
        return _Weightless(self.data, requires_grad=self.requires_grad)


def weightless_model(model: str | os.PathLike | nn.Module) -> nn.Module:
    """A model with every parameter zero, in no memory: of a checkpoint folder, or one on meta.

    Parameters are one number each, expanded to the shape: on the CPU, so that PEFT puts an
    adapter's weights there (to a model on the meta device it loads none). The copies that PEFT
    makes of modules to save take no memory either; weights can only be put in their place, as
    `load_stock_adapter` with `mapped` does.

    Raises:
        ValueError: as `model_skeleton` raises.
    """
    if not isinstance(model, nn.Module):
        model = model_skeleton(model)
    zeros: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in zeros:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                zeros[id(parameter)] = _Weightless(zero, requires_grad=False)
            setattr(module, name, zeros[id(parameter)])
    return model


def _take_on(model: nn.Module, dtypes: Sequence[torch.dtype]) -> None:
    widest = functools.reduce(torch.promote_types, dtypes)
    for parameter in model.parameters():
        if not isinstance(parameter, _Weightless):
            raise ValueError("model: only a weightless model can have a mapped adapter")
        parameter.data = torch.zeros((), dtype=widest).expand(parameter.shape)


def load_stock_adapter(
    model: nn.Module, folder: str | os.PathLike, *, mapped: bool = False
) -> PeftModel:
    """`PeftModel.from_pretrained` by PEFT's own LoRA tuner, every stored tensor accounted for.

    PEFT itself passes over tensors that it misses or does not expect. The global random state stays
    as it is.

    Args:
        model: the base; its layers are wrapped in place.
        folder: a saved adapter.
        mapped: leave the adapter's weights in its file, mapped into memory, in the dtype stored:
            pages that were read are the system's to take back. Needs a `weightless_model`, which
            takes on that dtype, for PEFT casts what it maps to the base's. Otherwise PEFT copies
            the weights, half precision as float32.

    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: if PEFT cannot load it, or it stores other tensors than its configuration means.
    """
    path = Path(folder)
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"adapter: the folder {path} has no {CONFIG_NAME}")
    names = [name for name, _ in model.named_modules()]
    config = read_adapter_config(path / CONFIG_NAME, "adapter")
    refuse_endless_patterns(config, names, f"adapter: {path / CONFIG_NAME}: ")
    file = TensorFile(path / WEIGHTS_NAME)
    stored = set(file.shapes)
    dtypes = [file.dtype(key) for key in file.shapes if ".lora_" in key]
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    kind = type(model).__name__
    if mapped and dtypes:
        _take_on(model, dtypes)
    with _stock_tuner(), torch.random.fork_rng(devices=[]):
        try:
            loaded = PeftModel.from_pretrained(
                model,
                os.fspath(path),
                torch_device=device,
                low_cpu_mem_usage=mapped,
                autocast_adapter_dtype=not mapped,
            )
        except _REFUSALS as error:
            raise ValueError(
                f"adapter: PEFT cannot load {path} into a {kind}: {type(error).__name__}: {error}"
            ) from error
        expected = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    for what, names in (("lacks", expected - stored), ("holds beyond it", stored - expected)):
        if names:
            raise ValueError(
                f"adapter: {path} does not store what its {CONFIG_NAME} means; it {what} "
                f"{len(names)} tensors, {min(names)} among them"
            )
    return loaded
