"""Starting the LoRA layers of a model from factors, when the adapter is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from torch import nn
from tqdm.auto import tqdm

from ..factors import FactorsFile, LowRankFactors, SvdGuided, WeightFactors, WeightSource
from ..models import base_weight, refuse_tensor_parallel, reshard
from .adapter_layers import is_linear, lora_layers, module_name, refuse_added_to_shards
from .config.svd import Coverage, SvdLoraConfig
from .svd_checks import (
    check_can_subtract,
    check_coverage,
    check_free,
    check_layer,
    check_outside_engine,
    check_same_base,
)
from .svd_writing import leave_to_saved_weights, start_without_factors, write_start

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
            self._factors = FactorsFile(
                config.svd_factors, revision=config.svd_factors_revision, argument="svd_factors"
            )

    def __call__(self, model: nn.Module, adapter_name: str) -> None:
        """`initialize_layers` as the configuration says."""
        config = self.config
        if self._awaits:
            leave_to_saved_weights(model, adapter_name, config.svd_start)
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
        RuntimeError: if the adapter is merged into the base weight or in a DeepSpeed engine, or the
            base was split by `fully_shard` before it got the adapter.
    """
    layers = {module_name(name): layer for name, layer in lora_layers(model, adapter_name)}
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoRA layer of that name")
    reshard(model)
    refuse_tensor_parallel(model, {name: each.get_base_layer() for name, each in layers.items()})
    check_coverage(layers, factors, coverage)
    matched = {name: layer for name, layer in layers.items() if name in factors}
    for name, layer in layers.items():
        check_free(name, layer, adapter_name)
    for name, layer in matched.items():
        check_layer(name, layer, adapter_name, factors)
    linear = {name: layer for name, layer in layers.items() if is_linear(layer, adapter_name)}
    refuse_added_to_shards(linear, adapter_name)
    check_outside_engine(linear, adapter_name)
    if initializer.start == "reference":
        for name, layer in layers.items():
            check_can_subtract(name, layer, adapter_name)
    if check_base and isinstance(factors, FactorsFile):
        check_same_base(model, matched, factors)
    for name, layer in tqdm(matched.items(), desc="SVD start", unit="layer", disable=None):
        init = initializer(
            factors[name], rank=layer.r[adapter_name], scaling=layer.scaling[adapter_name]
        )
        write_start(layer, adapter_name, init)
    skipped = [layer for name, layer in layers.items() if name not in matched]
    for layer in skipped:
        start_without_factors(layer, adapter_name, initializer.start)
    if skipped:
        logger.warning(
            "%d of %d LoRA layers have no factors and start at random", len(skipped), len(layers)
        )
