"""Starting the LoRA layers of a model from factors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..factors import (
    INITS_MOVING_BASE,
    FactorsFile,
    LoraInit,
    LowRankFactors,
    Split,
    Start,
    SvdGuided,
    WeightFactors,
    WeightSource,
)
from ..files import WrongKind
from ..models import BaseSample, base_weight, entries_at, first_difference, is_plain
from .adapter_layers import given_memory, is_linear, lora_layers, module_name, shortened
from .config.lori import LoriConfig
from .config.stock_saved import lora_options
from .config.svd import IN_MEMORY, Coverage, SvdLoraConfig
from .layers.parts import lora_linears
from .layers.reference import (
    ReferenceVariant,
    attach_reference,
    attach_zero_reference,
    detach_reference,
    reference_of,
)
from .magnitudes import refresh_magnitude

logger = logging.getLogger(__name__)


class SvdStart:
    """What a `SvdLoraConfig` asks for, its file opened before any model is touched.

    Raises:
        FileNotFoundError, ValueError: as `FactorsFile`, or if the factors were in memory and no
            saved weights are being loaded.
    """

    def __init__(self, config: SvdLoraConfig) -> None:
        self.config = config
        self._factors: FactorsFile | WeightFactors | None = None
        self._awaits = config.awaits_saved_weights()
        if config.svd_source == "teacher" and not self._awaits:
            self._factors = FactorsFile(config.svd_factors, revision=config.svd_factors_revision)

    def __call__(self, model: nn.Module, adapter_name: str) -> None:
        """`initialize_layers` as the configuration says."""
        config = self.config
        if self._awaits:
            _leave_to_saved_weights(model, adapter_name, config.svd_start)
            return
        if self._factors is None:  # A second call, after PEFT widened the adapter, has them.
            self._factors = _weight_factors(model, adapter_name, config)
        initialize_layers(
            model,
            self._factors,
            adapter_name,
            config.initializer(),
            coverage=config.svd_coverage,
            check_base=config.svd_check_base,
        )


def _weight_factors(model: nn.Module, adapter_name: str, config: SvdLoraConfig) -> WeightFactors:
    """Factors of the weights under the adapter's layers, one weight in memory at a time."""
    sources = {}
    for path, layer in lora_layers(model, adapter_name):
        name = module_name(path)
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
            a rank is above what is held, shapes differ, the factors are of another base model, or
            A or B is frozen by the kind of the adapter.
        TypeError: if a target layer is not a linear one.
        RuntimeError: if the adapter is merged into the base weight.
    """
    layers = {module_name(name): layer for name, layer in lora_layers(model, adapter_name)}
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoRA layer of that name")
    _check_coverage(layers, factors, coverage)
    matched = {name: layer for name, layer in layers.items() if name in factors}
    for name, layer in layers.items():
        _check_free(name, layer, adapter_name)
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
        ValueError, TypeError: as `SvdLoraConfig` and `initialize_layers` do, if the adapter's own
            initialisation moved the base weights, and if it is LoRI's or not LoRA's.
        RuntimeError: if the adapter is merged.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no adapter of that name")
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise WrongKind(
            f"adapter_name={adapter_name!r} was made with a {type(config).__name__}; only LoRA "
            "adapters start from factors: make it with a LoraConfig"
        )
    if isinstance(config, LoriConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is a LoRI adapter, whose A is the one that lori_seed "
            "draws and never changes; make it with a LoraConfig to start it from factors, or give "
            "the LoriConfig an adapter with the same A as lori_start"
        )
    previous = config.init_lora_weights
    if isinstance(previous, str) and previous.lower().startswith(INITS_MOVING_BASE):
        raise ValueError(
            f"adapter_name={adapter_name!r} was made with init_lora_weights={previous!r}, which "
            "moved the base weights; make the adapter with init_lora_weights=True first"
        )
    if isinstance(factors, FactorsFile):
        source = str(factors.path)
    else:
        source = IN_MEMORY if isinstance(factors, Mapping) else os.fspath(factors)
    new_config = SvdLoraConfig(
        **{**lora_options(config), "init_lora_weights": True},
        svd_factors=source,
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


def _check_coverage(
    layers: Mapping[str, LoraLayer], factors: Mapping[str, LowRankFactors], coverage: Coverage
) -> None:
    missing = [name for name in layers if name not in factors]
    unused = [name for name in factors if name not in layers]
    if len(missing) == len(layers):
        raise ValueError(
            f"svd_factors match none of the {len(layers)} target layers: they are for "
            f"{shortened(unused)}, the targets are {shortened(missing)}"
        )
    if coverage == "strict" and (missing or unused):
        raise ValueError(
            "svd_factors and target_modules differ: "
            f"{len(missing)} target layers without factors ({shortened(missing)}), "
            f"{len(unused)} factors without target layer ({shortened(unused)}); change "
            'target_modules, or set svd_coverage="partial" to accept this'
        )


def _check_free(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Of every layer: A and B of kinds that freeze one, LoRI and MiCA, are not those of a start."""
    frozen = layer.frozen_peft_weight_names.get(adapter_name)
    if frozen:
        raise ValueError(
            f"layer {name}: adapter {adapter_name!r} is of a kind that keeps {', '.join(frozen)} "
            "frozen as it was made, and factors would replace it; delete it and make the adapter "
            "with init_lora_weights=True in a LoraConfig first"
        )


def _check_layer(
    name: str,
    layer: LoraLayer,
    adapter_name: str,
    factors: Mapping[str, LowRankFactors],
) -> None:
    if not is_linear(layer, adapter_name):
        raise WrongKind(
            f"layer {name} is a {type(layer).__name__}, which has no matrix delta; only linear "
            "layers can start from factors: leave it out of target_modules"
        )
    if adapter_name in layer.merged_adapters:
        raise RuntimeError(
            f"layer {name}: adapter {adapter_name!r} is merged into the base weight; call "
            "unmerge_adapter() before initialising it"
        )
    rank = layer.r[adapter_name]
    if isinstance(factors, FactorsFile | WeightFactors):
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


def _check_can_subtract(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Also of a layer without factors: its A and B are saved at the doubled rank of all others."""
    kind = type(layer)
    consults_variants = (
        kind.lora_variants is not LoraLayer.lora_variants
        or kind.resolve_lora_variant is not LoraLayer.resolve_lora_variant
    )
    if not is_linear(layer, adapter_name) or not consults_variants:
        raise WrongKind(
            f"layer {name} is a {kind.__name__}, whose update can only be B A: leave it out of "
            'target_modules, or use another start than svd_start="reference"'
        )
    variant = layer.lora_variant.get(adapter_name)
    if not isinstance(variant, ReferenceVariant | None):
        raise ValueError(
            f'layer {name}: svd_start="reference" cannot be combined with {type(variant).__name__}'
        )


def _check_base(model: nn.Module, layers: Mapping[str, LoraLayer], factors: FactorsFile) -> None:
    difference = first_difference(_base_entries(layers, factors))
    if difference is not None:
        made_of = factors.metadata.base_model_name_or_path
        given = getattr(model, "name_or_path", None) or "unnamed"
        raise ValueError(
            f"svd_factors were taken from another base model ({made_of}) than this one "
            f"({given}): the weights of {difference} differ; make factors for this model, or "
            "set svd_check_base=False if you mean it"
        )


def _base_entries(
    layers: Mapping[str, LoraLayer], factors: FactorsFile
) -> Iterator[tuple[str, Tensor, BaseSample]]:
    """What the file remembers of each weight and what is there; nothing of quantised weights."""
    for name, layer in layers.items():
        sample = factors.base_sample(name)
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if sample is None or not isinstance(weight, Tensor) or weight.is_meta:
            continue
        if not is_plain(weight):
            continue
        shape = factors.shape_of(name)
        with gather_params_ctx(base.parameters()):
            matrix = weight.mT if getattr(layer, "fan_in_fan_out", False) else weight
            if matrix.shape != shape:  # Packed, in a way unknown here.
                continue
            found = entries_at(matrix, sample.positions(shape))
        yield name, found, sample


@torch.no_grad()
def _write(layer: LoraLayer, adapter_name: str, init: LoraInit) -> None:
    values = (init.lora_A, init.lora_B)
    for module, value in zip(lora_linears(layer, adapter_name), values, strict=True):
        if given_memory(module, layer) and module.bias is not None:
            module.bias.zero_()
        with gather_params_ctx(module.parameters()):
            module.weight.copy_(value)
    if init.subtract_initial:
        attach_reference(layer, adapter_name)
    elif isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant):
        detach_reference(layer, adapter_name)
    if adapter_name in layer.lora_magnitude_vector:
        refresh_magnitude(layer, adapter_name)


@torch.no_grad()
def _start_without_factors(layer: LoraLayer, adapter_name: str, initializer: SvdGuided) -> None:
    if not is_linear(layer, adapter_name):
        return
    parts = lora_linears(layer, adapter_name)
    given = [given_memory(part, layer) for part in parts]
    subtracts = isinstance(layer.lora_variant.get(adapter_name), ReferenceVariant)
    # A and B that mean the difference to a reference mean nothing without it.
    if any(given) or (subtracts and reference_of(layer, adapter_name)[1].any()):
        with gather_params_ctx(chain.from_iterable(part.parameters() for part in parts)):
            layer.reset_lora_parameters(adapter_name, True)
    if adapter_name in layer.lora_magnitude_vector:
        refresh_magnitude(layer, adapter_name)
    if initializer.start == "reference":
        attach_zero_reference(layer, adapter_name)
    elif subtracts:
        detach_reference(layer, adapter_name)


@torch.no_grad()
def _leave_to_saved_weights(model: nn.Module, adapter_name: str, start: Start) -> None:
    """Make every layer what the saved one was, without numbers: what is not loaded is no number."""
    for name, layer in lora_layers(model, adapter_name):
        if start == "reference":
            _check_can_subtract(module_name(name), layer, adapter_name)
        if not is_linear(layer, adapter_name):
            continue
        for part in lora_linears(layer, adapter_name):
            given_memory(part, layer)
            with gather_params_ctx(part.parameters()):
                part.weight.fill_(torch.nan)
        if start == "reference":
            attach_reference(layer, adapter_name)
        if adapter_name in layer.lora_magnitude_vector:
            refresh_magnitude(layer, adapter_name)
