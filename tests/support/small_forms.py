"""Tiny models of low rank, and the registration by which transformers loads their small form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from peft_svdinit.low_rank import LowRankRule, factorize_, make_plan, register_small_form
from peft_svdinit.low_rank.small_form import METHOD
from support.tiny_models import tiny_model


@contextmanager
def registered_small_form() -> Iterator[None]:
    """The registration, undone at the end."""
    register_small_form()
    yield
    unregister_small_form()


def unregister_small_form() -> None:
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        known.pop(METHOD, None)


def low_rank(
    architecture: Any = "llama",
    *,
    norms: bool = False,
    dtype: torch.dtype = torch.float32,
    targets: Any = "all-linear",
    **options: Any,
) -> PreTrainedModel:
    """A tiny model with layers of low rank, whose norms are no ones where they are trained."""
    model = tiny_model(architecture, **options)
    nn.Module.to(model, dtype)
    plan = make_plan(model, LowRankRule(ratio=0.3, multiple_of=2, target_modules=targets))
    factorize_(model, plan, train_norms=norms, row_normalise="norms")
    return model
