"""Weights that a checkpoint keeps under other names than the model has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_svdinit.models import Checkpoint


@torch.no_grad()
def load_renamed_(model: nn.Module, path: str) -> None:
    """Load a dense checkpoint by its architecture's conversions, if it lacks names of the model.

    `save_pretrained` of transformers writes the names that a model's checkpoints always had, and
    experts one by one; the Trainer, when it resumes, reads none of them back.

    Raises:
        ValueError: if the checkpoint has no weights for a parameter, by whatever name.
    """
    if not isinstance(model, PreTrainedModel) or not any(Path(path).glob("model*.safetensors")):
        return
    stored = set(Checkpoint(path, argument="checkpoint").shapes)
    optional = set(getattr(model, "all_tied_weights_keys", {}) or ())
    optional |= set(model._keys_to_ignore_on_save or ())
    if set(model.state_dict()) - stored <= optional:
        return
    kind: Any = type(model)
    loaded, told = kind.from_pretrained(path, dtype=model.dtype, output_loading_info=True)
    found, wanted = loaded.state_dict(), model.state_dict()
    missing = sorted({*told["missing_keys"], *(set(wanted) - set(found))})
    if missing:
        raise ValueError(
            f"checkpoint: {path} has no weights for {missing[0]} and {len(missing) - 1} others of "
            f"the {kind.__name__}: a checkpoint of another model?"
        )
    for name, tensor in wanted.items():
        tensor.copy_(found[name])
