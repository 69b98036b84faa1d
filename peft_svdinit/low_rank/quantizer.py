"""What makes `from_pretrained` of transformers load the small form of low-rank models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .candidates import low_rank_layers, replace_module_
from .layer import LowRankLinear
from .plan import LowRankPlan, PlannedLayer
from .planning import check_plan
from .small_form import METHOD, PLACEHOLDER_SHAPE, save_small_


def register_small_form() -> None:
    """Let `from_pretrained` of transformers load what `save_small_form` wrote, in this process.

    The model that it gives is an ordinary one with low-rank layers, all of it trained: nothing
    counts as quantised once it is loaded. Its `save_pretrained` writes the small form again; after
    `densify_`, an ordinary checkpoint. A second call changes nothing.

    Raises:
        ValueError: if another package has taken the name of the method.
    """
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD) is not SmallFormConfig:
        register_quantization_config(METHOD)(SmallFormConfig)
    if AUTO_QUANTIZER_MAPPING.get(METHOD) is not SmallFormQuantizer:
        register_quantizer(METHOD)(SmallFormQuantizer)


class SmallFormConfig(QuantizationConfigMixin):
    """The `quantization_config` of a small form.

    Args:
        layers: rank and shape by name, and whether the norms are trained.

    Raises:
        ValueError: if it is damaged, naming the layer.
    """

    def __init__(self, layers: Any = None, quant_method: str = METHOD, **others: Any) -> None:
        if others:
            raise ValueError(
                f"quantization_config: {', '.join(sorted(others))} of {METHOD} are unknown; "
                "written by a newer version of peft-svdinit?"
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.layers: dict[str, Any] = layers
        if not self.plan().layers:
            raise ValueError("damaged plan of low-rank layers: it names no layer")
        for name, each in self.layers.items():
            if not isinstance(each.get("norms", False), bool):
                raise ValueError(
                    f"damaged plan of low-rank layers: layer {name}: norms must be true or false, "
                    f"got {each['norms']!r}"
                )

    def plan(self) -> LowRankPlan:
        return LowRankPlan.from_dict(self.layers)

    def with_norms(self, name: str) -> bool:
        return self.layers[name].get("norms", False)


class SmallFormQuantizer(HfQuantizer):
    """Puts low-rank layers in the place of dense ones before transformers reads the weights."""

    # Of a dense checkpoint it would read none of the factors.
    requires_calibration = True
    quantization_config: SmallFormConfig

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"a model of {METHOD} cannot be loaded in parts: its layers have no plan for "
                "tensor parallelism; leave out tp_plan and distributed_config"
            )
        plan = self.quantization_config.plan()
        places = _places(model, plan)
        placed = LowRankPlan({new: plan.layers[old] for old, new in places.items()})
        if not placed.layers:
            return  # The heads that are of low rank are not those of this model.
        check_plan(model, placed)
        ties = dict(model.all_tied_weights_keys)
        ties |= {one: other for other, one in ties.items()}
        tied = [name for name in placed.layers if f"{name}.weight" in ties]
        if tied:
            raise ValueError(
                f"damaged plan of low-rank layers: layer {tied[0]}: its weight is tied to "
                f"{ties[f'{tied[0]}.weight']}"
            )
        stored = _layers_with_norms(checkpoint_files or ())
        for old, new in places.items():
            norms = self.quantization_config.with_norms(old)
            if old in stored and not norms:
                raise ValueError(
                    f"damaged plan of low-rank layers: layer {old} is without norms there, and the "
                    "file has its norms"
                )
            _put_empty(model, new, plan.layers[old], norms)
        ignored = {rf"(^|\.){re.escape(name)}\.weight$" for name in plan.layers}
        model._keys_to_ignore_on_load_unexpected = (
            set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, layer in low_rank_layers(model).items():
            for part, parameter in layer.named_parameters():
                # transformers marks what it read. Of an offloaded parameter nothing is known.
                read = getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta
                if not read and part != "bias":
                    raise ValueError(
                        f"layer {name}: the checkpoint lacks its {part}; fetch or save it again"
                    )
        self.remove_quantization_config(model)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized
        save_small_(model)


def _places(model: PreTrainedModel, plan: LowRankPlan) -> dict[str, str]:
    """The planned names with those that this model has for them.

    As transformers does with weights: a model with a head loads what its base model left and the
    other way about, when heads are left out.
    """
    prefix = model.base_model_prefix
    modules = {name for name, _ in model.named_modules()}
    if not prefix or all(name in modules for name in plan.layers):
        return {name: name for name in plan.layers}
    if prefix in modules:
        return {name: name if name in modules else f"{prefix}.{name}" for name in plan.layers}
    stripped = {
        name: name.removeprefix(f"{prefix}.")
        for name in plan.layers
        if name.startswith(f"{prefix}.")
    }
    return stripped or {name: name for name in plan.layers}


def _layers_with_norms(files: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                norms = [key for key in opened.keys() if key.endswith(".row_norm")]
            found |= {key.removesuffix(".row_norm") for key in norms}
    return found


def _put_empty(model: nn.Module, name: str, planned: PlannedLayer, norms: bool) -> None:
    module = model.get_submodule(name)
    weight: nn.Parameter = module.weight  # pyright: ignore[reportAssignmentType]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=weight.dtype, device="meta")

    (rows, cols), rank = planned.shape, planned.rank
    layer = LowRankLinear(
        empty(rows, rank),
        empty(rank, cols),
        getattr(module, "bias", None),
        row_norm=empty(rows) if norms else None,
        sv_norm=empty(rank) if norms else None,
        transposed=isinstance(module, Conv1D),
    )
    layer.register_load_state_dict_pre_hook(_drop_placeholder)
    replace_module_(model, module, layer)


def _drop_placeholder(
    layer: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any
) -> None:
    """Leave out what stands for the dense weight when a Trainer resumes from a small form."""
    found = state.get(f"{prefix}weight")
    if isinstance(found, Tensor) and tuple(found.shape) == PLACEHOLDER_SHAPE:
        del state[f"{prefix}weight"]
