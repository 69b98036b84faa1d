"""PEFT's LoRA tuner with starts from factors; with registration.py what knows PEFT's internals."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import is_recognised, recognition_sample
from .config import Coverage, SvdLoraConfig, config_of_alias, lora_options
from .deltas.adapter import INITS_MOVING_BASE
from .factor_sources import WeightFactors, WeightSource
from .factors import LowRankFactors
from .factors_file import FactorsFile
from .initializers import LoraInit, Split, Start, SvdGuided
from .layers.base_weight import base_weight, dequantised_weight
from .layers.reference import (
    ReferenceVariant,
    attach_reference,
    attach_zero_reference,
    detach_reference,
    lora_linears,
    reference_of,
    stacked_factors,
)

logger = logging.getLogger(__name__)

Factors = FactorsFile | WeightFactors

_IN_MEMORY = "<factors in memory>"
_PREFIX = "base_model.model."


class SvdLoraModel(LoraModel):
    """LoraModel that knows SvdLoraConfig and the string alias; any other config passes through."""

    _just_started: tuple[str, Factors] | None = None
    """The adapter whose weights nobody has touched since they were initialised, and from what."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = config_of_alias(cast(LoraConfig, self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        options = (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if not isinstance(config, SvdLoraConfig):
            super().inject_adapter(model, adapter_name, *options)
            return
        opened = None
        if config.svd_source == "teacher":  # Refuses a bad file before the model is touched.
            opened = FactorsFile(config.svd_factors, revision=config.svd_factors_revision)
        active = self.active_adapter
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with config.as_stock_start():
                super().inject_adapter(model, adapter_name, *options)
            if opened is None:
                factors = _weight_factors(self.model, adapter_name, config)
            else:
                factors = opened
            self._initialize(adapter_name, config, factors)
        except Exception:
            self._remove(adapter_name)
            self.active_adapter = active
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise
        self._just_started = (adapter_name, factors)

    def _initialize(self, adapter_name: str, config: SvdLoraConfig, factors: Factors) -> None:
        initialize_layers(
            self.model,
            factors,
            adapter_name,
            config.initializer(),
            coverage=config.svd_coverage,
            check_base=config.svd_check_base,
        )

    def _remove(self, adapter_name: str) -> None:
        if set(self.peft_config) == {adapter_name}:
            self.unload()
        else:
            self.delete_adapter(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        config = self.peft_config[adapter_name]
        before = _adapter_dtypes(self.model, adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        started, self._just_started = self._just_started, None
        if started is None or started[0] != adapter_name or not isinstance(config, SvdLoraConfig):
            return
        # PEFT creates adapters in the base's half precision and widens them here: initialise
        # again, or the start keeps the rounding.
        if before != _adapter_dtypes(self.model, adapter_name):
            self._initialize(adapter_name, config, started[1])

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        for name in adapters:
            if _references(self.model, name):
                raise ValueError(
                    f'adapters: {name!r} starts as svd_start="reference", whose update is not B A '
                    "alone; save it and load it as the stock LoRA it is saved as, then combine that"
                )
        config = self.peft_config.get(next(iter(adapters), ""))
        if not isinstance(config, SvdLoraConfig):
            super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        # The new adapter gets a copy of the first one's config and must not start from factors.
        self.peft_config[adapters[0]] = config.stock()
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config[adapters[0]] = config

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: nn.Module, peft_config: LoraConfig, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        if isinstance(peft_config, SvdLoraConfig):
            raise ValueError(
                "path_initial_model_for_weight_conversion subtracts what an initialisation took "
                "from the base weights, and svd_factors took nothing: save without it"
            )
        return super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, *args, **kwargs
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, layer in _references(model, adapter_name).items():
            keys = _weight_keys(name, adapter_name)
            # Processes other than the main one are given no tensors in sharded training.
            if tensors.keys() >= set(keys):
                stacked = stacked_factors(layer, adapter_name, *(tensors[key] for key in keys))
                tensors.update(zip(keys, stacked, strict=True))
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        tensors = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        # A teacher's factors can be another's; a weight's own are the same but for rounding.
        checked = not (isinstance(config, SvdLoraConfig) and config.svd_source == "weight")
        for name, layer in _references(model, adapter_name).items():
            _unstack(tensors, name, layer, adapter_name, checked=checked)
        return tensors


def _weight_factors(model: nn.Module, adapter_name: str, config: SvdLoraConfig) -> WeightFactors:
    """Factors of the weights under the adapter's layers, one weight in memory at a time."""
    sources = {}
    for path, layer in lora_layers(model, adapter_name):
        name = _module_name(path)
        sources[name] = WeightSource(
            read=partial(
                base_weight,
                layer.get_base_layer(),
                name,
                transposed=getattr(layer, "fan_in_fan_out", False),
            ),
            shape=(layer.out_features or 0, layer.in_features or 0),
            rank=layer.r[adapter_name],
        )
    return WeightFactors(sources, config.svd_part)


def initialize_layers(
    model: nn.Module,
    factors: Mapping[str, LowRankFactors],
    adapter_name: str,
    initializer: SvdGuided,
    *,
    coverage: Coverage = "strict",
    check_base: bool = True,
) -> None:
    """Write the start of every LoRA layer of the adapter under `model`, all layers checked first.

    Raises:
        ValueError: if target layers and factors do not cover each other (strict), none matches,
            a rank is above what is held, shapes differ, or the factors are of another base model.
        TypeError: if a target layer is not a linear one.
        RuntimeError: if the adapter is merged into the base weight.
    """
    layers = {_module_name(name): layer for name, layer in lora_layers(model, adapter_name)}
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoRA layer of that name")
    _check_coverage(layers, factors, coverage)
    matched = {name: layer for name, layer in layers.items() if name in factors}
    for name, layer in matched.items():
        _check_layer(name, layer, adapter_name, factors)
    if initializer.start == "reference":
        for name, layer in layers.items():
            _check_can_subtract(name, layer, adapter_name)
    if check_base and isinstance(factors, FactorsFile):
        _check_base(model, matched, factors)
    for name, layer in tqdm(matched.items(), desc="SVD start", unit="layer", disable=None):
        init = initializer(
            factors[name], rank=layer.r[adapter_name], scaling=layer.scaling[adapter_name]
        )
        _write(layer, adapter_name, init)
    skipped = [layer for name, layer in layers.items() if name not in matched]
    for layer in skipped:
        _start_without_factors(layer, adapter_name, initializer)
    if skipped:
        logger.warning(
            "%d of %d LoRA layers have no factors and start at random", len(skipped), len(layers)
        )


def initialize_lora_from_factors(
    model: nn.Module,
    factors: str | os.PathLike | Mapping[str, LowRankFactors],
    *,
    adapter_name: str = "default",
    start: Start = "delta",
    split: Split = "output",
    coverage: Coverage = "strict",
    check_base: bool = True,
) -> None:
    """Start an existing LoRA adapter from factors, in place.

    Args:
        model: a PeftModel, or a transformers model with an adapter added.
        factors: a factors file, folder or Hub id, or factors by module name.
        adapter_name: the adapter to initialise.
        start, split, coverage, check_base: as `svd_start` and so on of `SvdLoraConfig`.

    Raises:
        ValueError, TypeError: as `SvdLoraConfig` and `initialize_layers` do, and if the adapter's
            own initialisation moved the base weights.
        RuntimeError: if the adapter is merged.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no adapter of that name")
    previous = config.init_lora_weights
    if isinstance(previous, str) and previous.lower().startswith(INITS_MOVING_BASE):
        raise ValueError(
            f"adapter_name={adapter_name!r} was made with init_lora_weights={previous!r}, which "
            "moved the base weights; make the adapter with init_lora_weights=True first"
        )
    in_memory = isinstance(factors, Mapping)
    new_config = SvdLoraConfig(
        **{**lora_options(config), "init_lora_weights": True},
        svd_factors=_IN_MEMORY if in_memory else os.fspath(factors),
        svd_start=start,
        svd_split=split,
        svd_coverage=coverage,
        svd_check_base=check_base,
    )
    initialize_layers(
        model,
        factors if isinstance(factors, Mapping) else FactorsFile(factors),
        adapter_name,
        new_config.initializer(),
        coverage=coverage,
        check_base=check_base,
    )
    configs[adapter_name] = new_config


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Names and LoRA layers that carry the adapter, whatever the kind of layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
        ):
            yield name, module


def _module_name(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _check_coverage(
    layers: Mapping[str, LoraLayer], factors: Mapping[str, LowRankFactors], coverage: Coverage
) -> None:
    missing = [name for name in layers if name not in factors]
    unused = [name for name in factors if name not in layers]
    if len(missing) == len(layers):
        raise ValueError(
            f"svd_factors match none of the {len(layers)} target layers: they are for "
            f"{_shortened(unused)}, the targets are {_shortened(missing)}"
        )
    if coverage == "strict" and (missing or unused):
        raise ValueError(
            "svd_factors and target_modules differ: "
            f"{len(missing)} target layers without factors ({_shortened(missing)}), "
            f"{len(unused)} factors without target layer ({_shortened(unused)}); change "
            'target_modules, or set svd_coverage="partial" to accept this'
        )


def _shortened(names: list[str]) -> str:
    listed = ", ".join(names[:5]) or "none"
    return f"{listed}, …" if len(names) > 5 else listed


def _check_layer(
    name: str,
    layer: LoraLayer,
    adapter_name: str,
    factors: Mapping[str, LowRankFactors],
) -> None:
    if not _is_linear(layer, adapter_name):
        raise TypeError(
            f"layer {name} is a {type(layer).__name__}, which has no matrix delta; only linear "
            "layers can start from factors: leave it out of target_modules"
        )
    if adapter_name in layer.merged_adapters:
        raise RuntimeError(
            f"layer {name}: adapter {adapter_name!r} is merged into the base weight; call "
            "unmerge_adapter() before initialising it"
        )
    rank = layer.r[adapter_name]
    if isinstance(factors, Factors):
        held, shape = factors.rank_of(name), factors.shape_of(name)
    else:
        held, shape = factors[name].rank, factors[name].shape
    if rank > held:
        raise ValueError(
            f"layer {name}: r={rank} is above the {held} triplets that its factors hold; lower r "
            "(or set rank_pattern for this layer), or make factors of a higher rank"
        )
    expected = (layer.out_features, layer.in_features)
    if shape != expected:
        raise ValueError(
            f"layer {name}: svd_factors are of a delta of shape {shape}, the layer's "
            f"weight is {expected} (out, in): factors of another model?"
        )


def _is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    lora_A = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
    return isinstance(lora_A, nn.Linear) and not isinstance(layer, ParamWrapper)


def _check_can_subtract(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Also of a layer without factors: its A and B are saved at the doubled rank of all others."""
    kind = type(layer)
    consults_variants = (
        kind.lora_variants is not LoraLayer.lora_variants
        or kind.resolve_lora_variant is not LoraLayer.resolve_lora_variant
    )
    if not _is_linear(layer, adapter_name) or not consults_variants:
        raise TypeError(
            f"layer {name} is a {kind.__name__}, whose update can only be B A: leave it out of "
            'target_modules, or use another start than svd_start="reference"'
        )
    variant = layer.lora_variant.get(adapter_name)
    if not isinstance(variant, ReferenceVariant | None):
        raise ValueError(
            f'layer {name}: svd_start="reference" cannot be combined with {type(variant).__name__}'
        )


def _check_base(model: nn.Module, layers: Mapping[str, LoraLayer], factors: FactorsFile) -> None:
    made_of = factors.metadata.base_model_name_or_path
    for name, layer in layers.items():
        sample = factors.base_sample(name)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if sample is None or weight is None or not weight.is_floating_point() or weight.is_meta:
            continue
        with gather_params_ctx(weight):
            if weight.dim() != 2 or weight.element_size() < 2:
                continue
            transposed = getattr(layer, "fan_in_fan_out", False)
            found = recognition_sample(weight.mT if transposed else weight)
        if not is_recognised(found, sample):
            given = getattr(model, "name_or_path", None) or "unnamed"
            raise ValueError(
                f"svd_factors were taken from another base model ({made_of}) than this one "
                f"({given}): the weights of layer {name} differ; make factors for this model, or "
                "set svd_check_base=False if you mean it"
            )


@torch.no_grad()
def _write(layer: LoraLayer, adapter_name: str, init: LoraInit) -> None:
    values = (init.lora_A, init.lora_B)
    for module, value in zip(lora_linears(layer, adapter_name), values, strict=True):
        if _given_memory(module, layer) and module.bias is not None:
            module.bias.zero_()
        with gather_params_ctx(module.parameters()):
            module.weight.copy_(value)
    if init.subtract_initial:
        attach_reference(layer, adapter_name)
    elif isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant):
        detach_reference(layer, adapter_name)
    if adapter_name in layer.lora_magnitude_vector:
        _refresh_magnitude(layer, adapter_name)


@torch.no_grad()
def _start_without_factors(layer: LoraLayer, adapter_name: str, initializer: SvdGuided) -> None:
    if not _is_linear(layer, adapter_name):
        return
    given = [_given_memory(part, layer) for part in lora_linears(layer, adapter_name)]
    if any(given):
        layer.reset_lora_parameters(adapter_name, True)
    if adapter_name in layer.lora_magnitude_vector:
        _refresh_magnitude(layer, adapter_name)
    if initializer.start == "reference":
        attach_zero_reference(layer, adapter_name)


def _given_memory(module: nn.Linear | DoraLinearLayer, layer: LoraLayer) -> bool:
    """Whether the adapter's module was on the meta device (low_cpu_mem_usage) and no longer is."""
    if not module.weight.is_meta:
        return False
    base_weight = getattr(layer.get_base_layer(), "weight", None)
    if base_weight is None or base_weight.is_meta:
        module.to_empty(device="cpu")
    else:
        module.to_empty(device=base_weight.device)
    return True


def _refresh_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """Set DoRA's magnitudes to the norms of base + update, in place: an optimizer may hold them."""
    magnitude = cast(DoraLinearLayer, layer.lora_magnitude_vector[adapter_name])
    lora_A, lora_B = lora_linears(layer, adapter_name)
    base_layer = layer.get_base_layer()
    _given_memory(magnitude, layer)
    read = [part.parameters() for part in (lora_A, lora_B, base_layer)]
    with gather_params_ctx(chain.from_iterable(read)):
        weight = dequantised_weight(base_layer).to(lora_A.weight.device)
        product = lora_B.weight @ lora_A.weight
        norm = magnitude.get_weight_norm(weight, product, layer.scaling[adapter_name])
    with gather_params_ctx(magnitude.parameters()):
        magnitude.weight.copy_(norm)


def _references(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    return {
        name: layer
        for name, layer in lora_layers(model, adapter_name)
        if isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant)
    }


def _weight_keys(name: str, adapter_name: str) -> list[str]:
    return [f"{name}.lora_{part}.{adapter_name}.weight" for part in "AB"]


def _unstack(
    tensors: dict[str, Tensor], name: str, layer: LoraLayer, adapter_name: str, *, checked: bool
) -> None:
    """Turn the saved [A ; A₀] and [B | −B₀] of a layer into A and B.

    A₀ and B₀ must be those of the layer if `checked`, and replace them in any case: the trained A
    and B are relative to what was saved, to the last bit.
    """
    keys = _weight_keys(name, adapter_name)
    if not tensors.keys() >= set(keys):
        return  # PEFT reports what a file lacks.
    stacked_A, stacked_B = (tensors[key] for key in keys)
    reference_A, reference_B = reference_of(layer, adapter_name)
    rank = layer.r[adapter_name]
    if stacked_A.shape[0] != 2 * rank:
        raise ValueError(
            f'layer {name}: a saved svd_start="reference" adapter of rank {rank} has {2 * rank} '
            f"rows in lora_A, this one has {stacked_A.shape[0]}"
        )
    saved = (stacked_A[rank:].to(reference_A), -stacked_B[:, rank:].to(reference_B))
    if checked and not all(map(torch.allclose, saved, (reference_A, reference_B))):
        raise ValueError(
            f"layer {name}: the saved adapter started from other factors than svd_factors of this "
            "model; resume with the factors it was trained with"
        )
    reference_A.copy_(saved[0])
    reference_B.copy_(saved[1])
    tensors[keys[0]], tensors[keys[1]] = stacked_A[:rank].clone(), stacked_B[:, :rank].clone()


def _adapter_dtypes(model: nn.Module, adapter_name: str) -> set[torch.dtype]:
    return {
        lora_linears(layer, adapter_name)[0].weight.dtype
        for _, layer in lora_layers(model, adapter_name)
        if adapter_name in layer.lora_A
    }


def lora_scalings(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """The factor before B A of every LoRA layer that carries the adapter, by module name."""
    return {
        _module_name(name): layer.scaling[adapter_name]
        for name, layer in lora_layers(model, adapter_name)
    }
