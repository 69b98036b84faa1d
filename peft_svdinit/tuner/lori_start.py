"""Making the LoRA layers of a model LoRI's: A drawn and frozen, B sparse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from ..factors import LoraAdapter
from ..files import WrongKind
from ..masks import (
    LayerScores,
    LoriMask,
    is_same_projection,
    load_mask,
    random_projection,
    tensor_hash,
)
from ..models import overwrite_, refuse_tensor_parallel
from .adapter_layers import (
    given_memory,
    is_linear,
    lora_layers,
    module_name,
    refuse_added_to_shards,
    shortened,
)
from .config.lori import RANDOM, LoriConfig
from .layers.parts import lora_linears
from .layers.sparse_factor import SparseFactor
from .magnitudes import refresh_magnitude


class LoriStart:
    """What a `LoriConfig` asks for, its files opened and checked before any model is touched.

    Raises:
        FileNotFoundError, ValueError: if the mask or the adapter to start from cannot be read, or
            the mask is for another seed or density than the configuration's.
    """

    def __init__(self, config: LoriConfig) -> None:
        self.config = config
        self._mask = None if config.lori_mask == RANDOM else _opened(config)
        self._start = None
        if config.lori_start is not None:
            self._start = LoraAdapter(config.lori_start, argument="lori_start")

    def __call__(self, model: nn.Module, adapter_name: str) -> None:
        """Write A and B of every layer of the adapter, all layers checked first.

        Raises:
            TypeError: if a target layer is not a linear one, or is split by tensor parallelism.
            RuntimeError: if the base was split by `fully_shard` before it got the adapter.
            ValueError: if mask, adapter to start from and target layers do not fit each other.
        """
        config = self.config
        layers = {module_name(name): layer for name, layer in lora_layers(model, adapter_name)}
        for name, layer in layers.items():
            if not is_linear(layer, adapter_name):
                raise WrongKind(
                    f"layer {name} is a {type(layer).__name__}, whose B is no matrix; LoRI is for "
                    "linear layers: leave it out of target_modules"
                )
        refuse_tensor_parallel(model, {n: layer.get_base_layer() for n, layer in layers.items()})
        refuse_added_to_shards(layers, adapter_name)
        shapes = {
            name: (layer.out_features or 0, layer.r[adapter_name]) for name, layer in layers.items()
        }
        mask = None
        if config.is_sparse:
            in_features = {name: layer.in_features or 0 for name, layer in layers.items()}
            mask = self._mask or LayerScores.random(
                shapes, in_features, config.lori_seed, config.base_model_name_or_path
            ).mask(config.selection)
            _check_layers(mask, shapes, layers)
        for name, layer in layers.items():
            lora_A = random_projection(
                name, layer.r[adapter_name], layer.in_features or 0, config.lori_seed
            )
            if mask is not None and tensor_hash(lora_A) != mask.layers[name].hash_A:
                raise ValueError(
                    f"lori_mask: layer {name} has another A than the mask was made with, although "
                    "the seed is the same; make the mask again with this version"
                )
            start = None
            if self._start is not None:
                start = _started(self._start, name, lora_A, layer, adapter_name)
            _write(layer, adapter_name, lora_A, start, mask and mask.layers[name].mask)
            sparse = layer.lora_B[adapter_name]
            # Made for inference, an adapter computes nothing until its saved weights are loaded.
            if config.inference_mode and isinstance(sparse, SparseFactor):
                sparse.awaited_by = name
        if mask is not None:
            config.remember(mask)


def _opened(config: LoriConfig) -> LoriMask:
    mask = load_mask(config.lori_mask, argument="lori_mask")
    if abs(mask.density - config.lori_density) > 1e-9:
        raise ValueError(
            f"lori_mask {config.lori_mask} has density {mask.density}, lori_density is "
            f"{config.lori_density}; set lori_density={mask.density}"
        )
    if mask.seed != config.lori_seed:
        raise ValueError(
            f"lori_mask {config.lori_mask} belongs to the A of seed {mask.seed}, lori_seed is "
            f"{config.lori_seed}; set lori_seed={mask.seed}"
        )
    return mask


def _check_layers(
    mask: LoriMask, shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, LoraLayer]
) -> None:
    missing = [name for name in shapes if name not in mask.layers]
    unused = [name for name in mask.layers if name not in shapes]
    if missing or unused:
        raise ValueError(
            f"lori_mask and target_modules differ: {len(missing)} target layers without mask "
            f"({shortened(missing)}), {len(unused)} masks without target layer "
            f"({shortened(unused)}); a mask of another model? Change target_modules or make a mask"
        )
    for name, (rows, rank) in shapes.items():
        masked, in_features = mask.layers[name], layers[name].in_features
        if masked.rank != rank:
            raise ValueError(
                f"layer {name}: lori_mask is for rank {masked.rank}, r is {rank}; set "
                f"r={masked.rank}"
            )
        if (masked.mask.shape[0], masked.in_features) != (rows, in_features):
            raise ValueError(
                f"layer {name}: lori_mask is for a weight of shape "
                f"{(masked.mask.shape[0], masked.in_features)}, this one is {(rows, in_features)} "
                "(out, in): a mask of another model?"
            )


def _started(
    adapter: LoraAdapter, name: str, lora_A: Tensor, layer: LoraLayer, adapter_name: str
) -> Tensor:
    """B of the adapter to start from, if its A and its scaling are ours."""
    if name not in adapter:
        raise ValueError(
            f"lori_start: {adapter.folder} has no layer {name}; start from an adapter with the "
            "same target_modules"
        )
    saved = adapter[name]
    if saved.shape != (layer.out_features, layer.in_features) or not is_same_projection(
        saved.lora_A, lora_A
    ):
        raise ValueError(
            f"lori_start: layer {name} of {adapter.folder} has another A than lori_seed draws; "
            "start from an adapter of the same lori_seed and r"
        )
    if saved.scaling != layer.scaling[adapter_name]:
        raise ValueError(
            f"lori_start: layer {name} of {adapter.folder} has the scaling {saved.scaling:g}, here "
            f"it is {layer.scaling[adapter_name]:g}, so that the same B would mean another update; "
            "take its lora_alpha, alpha_pattern and use_rslora"
        )
    return saved.lora_B


@torch.no_grad()
def _write(
    layer: LoraLayer,
    adapter_name: str,
    lora_A: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
) -> None:
    part_A, part_B = lora_linears(layer, adapter_name)
    given_memory(part_A, layer)
    overwrite_(part_A.weight, lora_A)
    _register_frozen_peft_weight(layer, adapter_name, "lora_A")
    if mask is None:
        given_memory(part_B, layer)
        shape = (layer.out_features or 0, layer.r[adapter_name])
        overwrite_(part_B.weight, torch.zeros(shape) if start is None else start)
    else:
        like = part_A.weight
        sparse = SparseFactor(mask, start, dtype=like.dtype, device=like.device)
        trained = next(part_B.parameters())
        sparse.requires_grad_(trained.requires_grad)
        layer.lora_B[adapter_name] = sparse.train(part_B.training)
    if adapter_name in layer.lora_magnitude_vector:
        refresh_magnitude(layer, adapter_name)
