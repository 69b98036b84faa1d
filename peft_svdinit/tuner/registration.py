"""Making PEFT use our tuner for its LoRA type, and undoing it."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel

from .model import SvdLoraModel


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


def unregister() -> None:
    """Give PEFT its own LoRA tuner back, for adapters created from now on; again is harmless."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is SvdLoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
