"""What must hold before the layers of an adapter start from factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..factors import FactorsFile, LowRankFactors, WeightFactors
from ..files import WrongKind
from ..models import (
    BaseSample,
    entries_at,
    first_difference,
    gathered,
    in_training_engine,
    is_plain,
    whole,
)
from .adapter_layers import is_linear, shortened
from .config.svd import Coverage
from .layers.parts import lora_linears
from .layers.reference import ReferenceVariant


def check_coverage(
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
            'target_modules; SvdLoraConfig(svd_coverage="partial") accepts this'
        )


def check_free(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Of every layer: A and B of kinds that freeze one, LoRI and MiCA, are not those of a start."""
    frozen = layer.frozen_peft_weight_names.get(adapter_name)
    if frozen:
        raise ValueError(
            f"layer {name}: adapter {adapter_name!r} is of a kind that keeps {', '.join(frozen)} "
            "frozen as it was made, and factors would replace it; delete it and make the adapter "
            "with init_lora_weights=True in a LoraConfig first"
        )


def check_layer(
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


def check_outside_engine(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Of all linear layers of the adapter at once, so that all processes come to one answer."""
    parts = (part for layer in layers.values() for part in lora_linears(layer, adapter_name))
    if in_training_engine(parameter for part in parts for parameter in part.parameters()):
        raise RuntimeError(
            f"layer {next(iter(layers))}: adapter {adapter_name!r} is in a DeepSpeed engine, whose "
            "optimizer has copies of its own, and would undo a start with the first step; start it "
            "before the engine is made"
        )


def check_can_subtract(name: str, layer: LoraLayer, adapter_name: str) -> None:
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


def check_same_base(
    model: nn.Module, layers: Mapping[str, LoraLayer], factors: FactorsFile
) -> None:
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
        if sample is None:
            continue
        found = _entries(layer, sample, factors.shape_of(name))
        if found is not None:
            yield name, found, sample


def _entries(layer: LoraLayer, sample: BaseSample, shape: tuple[int, int]) -> Tensor | None:
    """What the layer's base weight has where the sample is from, if it is readable numbers."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not is_plain(weight):
        return None
    # Nothing that refers to a gathered weight may outlive this, or two would be whole at a time.
    with gathered(base.parameters()):
        matrix = whole(weight.detach())
        matrix = matrix.mT if getattr(layer, "fan_in_fan_out", False) else matrix
        if matrix.shape != shape:  # Packed, in a way unknown here.
            return None
        return entries_at(matrix, sample.positions(shape))
