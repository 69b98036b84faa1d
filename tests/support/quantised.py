"""Copies of a model with bitsandbytes' quantised layers; skips where that is missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

bitsandbytes = pytest.importorskip("bitsandbytes")


KINDS = ("4bit", "8bit")


def quantised(base: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy of `base` whose linear layers are quantised, as from_pretrained leaves it."""
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        options = {"bias": module.bias is not None}
        if kind == "4bit":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
                **options,
            )
            # Evaluation on a CPU with AVX512-BF16 would repack it, which needs 32 rows.
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, has_fp16_weights=False, **options
            )
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer.to("cpu").requires_grad_(False))
    setattr(model, f"is_loaded_in_{kind}", True)
    return model.eval()
