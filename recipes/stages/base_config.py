"""The configuration of a base model, read before a model is made of it."""

from __future__ import annotations

from pathlib import Path

from peft_svdinit.models import MODEL_CONFIG, read_model_config
from peft_svdinit.training import ModelOptions, resolve_model


def check_configuration(model: ModelOptions) -> None:
    """Refuse sizes of no model, which would take hours or all memory to make.

    A model of the Hub is left to those who load it.

    Raises:
        ValueError: naming the entry of `config.json`.
    """
    folder = Path(resolve_model(model.model_name_or_path)).expanduser()
    if (folder / MODEL_CONFIG).is_file():
        read_model_config(folder / MODEL_CONFIG, "model_name_or_path")
