"""Making PEFT use our tuner for its LoRA type, and undoing it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from peft import LoraConfig, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from torch import nn

from .config.alias import is_ours, marked
from .model import SvdLoraModel

_INJECT = LoraModel.inject_adapter
_CHECK = PeftConfigMixin.check_kwargs.__func__


@wraps(_INJECT)
def _inject_adapter(
    self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """A model of stock adapters is PEFT's own, and becomes ours with the first that is ours."""
    config = cast(LoraConfig, self.peft_config[adapter_name])
    if type(self) is LoraModel and _is_registered() and is_ours(config):
        self.__class__ = SvdLoraModel
        self.inject_adapter(model, adapter_name, *args, **kwargs)
    else:
        _INJECT(self, model, adapter_name, *args, **kwargs)


@wraps(_CHECK)
def _check_kwargs(cls: type[PeftConfigMixin], **kwargs: Any) -> dict[str, Any]:
    """Whatever PEFT reads a configuration's file for, it calls this with what is in it."""
    return marked(_CHECK(cls, **kwargs))


def _let_check_kwargs_be(function: Callable[..., dict[str, Any]]) -> None:
    PeftConfigMixin.check_kwargs = classmethod(function)  # pyright: ignore[reportAttributeAccessIssue]


def _is_registered() -> bool:
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is SvdLoraModel


def register() -> None:
    """Route LoRA adapters through `SvdLoraModel`. Importing the package does it; again is harmless.

    Raises:
        RuntimeError: if another package has put its own tuner in place.
    """
    present = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    if present not in (LoraModel, SvdLoraModel):
        raise RuntimeError(
            f"PEFT's LoRA tuner was replaced by {present.__module__}.{present.__name__}; "
            "peft_svdinit cannot be registered beside it"
        )
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = SvdLoraModel
    LoraModel.inject_adapter = _inject_adapter
    _let_check_kwargs_be(_check_kwargs)


def unregister() -> None:
    """Give PEFT its own LoRA tuner back, for adapters created from now on; again is harmless."""
    if _is_registered():
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
        LoraModel.inject_adapter = _INJECT
        _let_check_kwargs_be(_CHECK)
