"""The model that a training loads, on the meta device: shapes and types, no weights."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from .in_one_piece import whole_weights
from .models import ModelOptions, checked_source
from .refusal import refused_as

_FLOAT32, _BLOCK_4BIT, _CODE_4BIT = 4, 64, 16


class QuantisedLinear(nn.Linear):
    """A linear layer that stands for one of bitsandbytes, with its weight in the type it runs in.

    Attributes:
        bits: 4 (NF4 in blocks of 64, scales in float32) or 8 (a scale for each row).
    """

    def __init__(self, linear: nn.Linear, bits: int, dtype: torch.dtype) -> None:
        bias = linear.bias is not None
        super().__init__(
            linear.in_features, linear.out_features, bias, device="meta", dtype=torch.float32
        )
        self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        self.bits = bits

    @property
    def stored_bytes(self) -> int:
        """Of the weight as bitsandbytes holds it, with its scales."""
        entries = self.weight.numel()
        if self.bits == 8:
            return entries + _FLOAT32 * self.out_features
        scales = ceil(entries / _BLOCK_4BIT) + _CODE_4BIT
        return ceil(entries / 2) + _FLOAT32 * scales

    def forward(self, input: Tensor) -> Tensor:
        result = _Dequantised.apply(input.to(self.weight.dtype), self.weight)
        result = result if self.bias is None else result + self.bias
        return result.to(input.dtype)


class _Dequantised(torch.autograd.Function):
    """A product with a weight that is there in full only while it is used, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(input, weight.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.saved_tensors[0].clone(), None


class StoredQuantised(ValueError):
    """A model whose weights are stored in few bits, in layers that are not known here."""


def load_skeleton(options: ModelOptions) -> PreTrainedModel:
    """What `load_model` would load, from the configuration alone, on the meta device.

    A quantised model is prepared for training as `peft.prepare_model_for_kbit_training` does it:
    frozen, what is not quantised in float32, gradient checkpointing on.

    Raises:
        ValueError: if there is no configuration, or none of a causal language model.
        StoredQuantised: if it is that of weights which are stored quantised.
    """
    source = checked_source(options)
    where = f"model_name_or_path: {options.model_name_or_path}"
    remote: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    with refused_as(f"{where} has no configuration that can be read"):
        config = AutoConfig.from_pretrained(source, revision=options.model_revision, **remote)
    if getattr(config, "quantization_config", None):
        raise StoredQuantised(f"{where}: its weights are stored quantised, of sizes unknown here")
    with refused_as(f"{where} has a configuration of no causal language model"):
        stored: Any = config.dtype or torch.float32
        dtype: torch.dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
        if options.attn_implementation:
            remote["attn_implementation"] = options.attn_implementation
        with whole_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **remote)
    if options.load_in_4bit or options.load_in_8bit:
        _quantise_(model, 4 if options.load_in_4bit else 8, dtype)
    return model


def _quantise_(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> None:
    model.requires_grad_(False)
    model.float()
    kept = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in kept:
            model.set_submodule(name, QuantisedLinear(module, bits, dtype).requires_grad_(False))
    enable_checkpointing_(model)


def enable_checkpointing_(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Turn gradient checkpointing on as the Trainer does, under the name that its version has."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # pyright: ignore
    else:
        options = dict(options or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        enable(activation_checkpointing_kwargs=options or None, **own)
