"""The delta of a saved LoRA adapter, layer by layer, as the two factors it is stored in."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...files import (
    LazyMapping,
    TensorReader,
    opened,
    read_together,
    refuse_non_floats,
    resolve_file,
    resolve_folder,
)
from ...models import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    PatternValues,
    adapted_module,
    lora_key,
    natural_order,
    read_adapter_config,
    refuse_endless_patterns,
    spelled_in_peft,
    unwrapped_config,
    unwrapped_keys,
)
from ..low_rank import LowRankFactors

logger = logging.getLogger(__name__)

_SUFFIX_A, _SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
MERGED_CHECKPOINT = (
    "merge it into its base by PEFT's merge_and_unload, save that, and extract the delta of the "
    "two: svdinit extract --base BASE --tuned MERGED"
)
_LINEAR_ONLY = (
    f"only linear layers are supported: {MERGED_CHECKPOINT}, with --modules_to_save for "
    "embeddings and convolutions"
)
# Options whose adapters PEFT cannot merge, or whose merged weights no linear layer holds.
_NEVER_MERGED = (
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "target_parameters",
    "layer_replication",
)
# Options under which the update of a weight is not scaling * B @ A.
_BEYOND_THE_PRODUCT = (
    "use_dora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    *_NEVER_MERGED,
)
# Options whose tensors lie beside the factors, and say nothing of scaling * B @ A.
_BESIDE = ("modules_to_save", "trainable_token_indices", "lora_bias")
_PARTS: tuple[Literal["A"], Literal["B"]] = ("A", "B")
_MAGNITUDE, _BIAS = ".lora_magnitude_vector", ".lora_B.bias"
# Initialisations that moved the base weight: B @ A is then no delta of the original base.
INITS_MOVING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def options_beyond_the_product(config: Mapping[str, Any]) -> list[str]:
    """Options of an `adapter_config.json` in use that add to scaling * B @ A, or change it."""
    beyond = [option for option in (*_BEYOND_THE_PRODUCT, *_BESIDE) if config.get(option)]
    return [*beyond, "bias"] if config.get("bias", "none") != "none" else beyond


def product_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the options whose tensors lie beside the factors."""
    return {**config, **{option: None for option in _BESIDE if config.get(option)}, "bias": "none"}


@dataclass(frozen=True)
class LoraProduct:
    """`scaling * lora_B @ lora_A`, unmultiplied; (out, in) for Conv1D layers too."""

    lora_A: Float[Tensor, "rank in"]
    lora_B: Float[Tensor, "out rank"]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def factors(self, rank: int | None = None) -> LowRankFactors:
        """The SVD of the product through its thin factors; the leading `rank` triplets, or all."""
        factors = LowRankFactors.from_product(self.lora_B, self.lora_A, self.scaling)
        return factors if rank is None else factors.truncated(min(rank, factors.rank))

    def product(self) -> tuple[Float[Tensor, "out inner"], Float[Tensor, "inner in"]]:
        """Two matrices whose product is the delta, the scaling included."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        return self.lora_B.to(wide) * self.scaling, self.lora_A.to(wide)


class LoraAdapter(LazyMapping[LoraProduct]):
    """Read-only, lazy view of a saved PEFT LoRA adapter: module name to `LoraProduct`.

    Names are without what torch's wrappers add, such as `_orig_mod` of torch.compile. Tensors that
    lie beside the factors, such as modules saved whole and biases of lora_B, are no part of it.

    Args:
        path_or_id: a folder or Hub repository with `adapter_config.json` and
            `adapter_model.safetensors`.
        revision: branch, tag or commit of the Hub repository.
        argument: by which the user gave it; the messages of errors begin with it.
        with_beside: whether the caller takes what is `beside` too: DoRA's magnitudes are accepted
            then, without which scaling * B @ A is not the update. If not, a warning names what is
            left out.

    Attributes:
        config: `adapter_config.json`, which means the layers by names without wrappers.
        beside: names of the tensors beside the factors, without PEFT's prefix, to their keys in
            the file.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the adapter is no LoRA, stores a pickle, is truncated, or has layers whose
            update B @ A does not express (DoRA, embeddings, convolutions, initialisations that
            mutate the base), or two that are one but for wrappers; if an entry of its configuration
            is not what it must be, or an expression there takes too long.
        TypeError: if a factor is quantised, or holds no floating-point numbers.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike,
        *,
        revision: str | None = None,
        argument: str = "adapter",
        with_beside: bool = False,
    ) -> None:
        self.argument, self._with_beside = argument, with_beside
        self.folder = resolve_folder(path_or_id, argument=argument, revision=revision)
        with read_together(self.folder / CONFIG_NAME, argument):
            self.config = self._read_config()
            self._values = self._pattern_values()
            self._path = resolve_file(self.folder, WEIGHTS_NAME, argument=argument)
            self._read_names()
            self._reader = TensorReader(self._path, argument)
        if any(key != at for key, at in self._stored.items()):
            self.config = self._config_without_wrappers()
            self._values = self._pattern_values()
        if self.beside and not with_beside:
            logger.warning(
                "%s: %s stores %d tensors beside its layers, which are left out: %s.",
                argument,
                path_or_id,
                len(self.beside),
                ", ".join(list(self.beside)[:3]) + (", …" if len(self.beside) > 3 else ""),
            )

    def _read_names(self) -> None:
        with opened(self._path, self.argument) as file:
            self._stored = unwrapped_keys(file.keys())
            names = {adapted_module(key) for pair in self._stored.items() for key in pair}
            refuse_endless_patterns(self.config, names, f"{CONFIG_NAME} beside it: ")
            shapes = {key: file.get_slice(at).get_shape() for key, at in self._stored.items()}
            self.names = dict.fromkeys(self._checked_names(shapes))
            for part in _PARTS:
                refuse_non_floats(file, [self.stored_key(name, part) for name in self.names])

    def _read_config(self) -> dict[str, Any]:
        path = resolve_file(self.folder, CONFIG_NAME, argument=self.argument)
        config = read_adapter_config(path, self.argument)
        place = f"{self.argument}: {self.folder}"
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{place} is of type {config.get('peft_type')}, only LORA is supported; "
                "peft.convert_to_lora turns many other types into it"
            )
        taken = ("use_dora",) if self._with_beside else ()
        beyond = [one for one in _BEYOND_THE_PRODUCT if config.get(one) and one not in taken]
        if beyond:
            lost = any(option in _NEVER_MERGED for option in beyond)
            remedy = "no LoRA of linear layers does the same: use it with PEFT as it is"
            raise ValueError(
                f"{place} uses {', '.join(beyond)}, so that its effect is not scaling * B @ A; "
                f"{remedy if lost else MERGED_CHECKPOINT}"
            )
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(INITS_MOVING_BASE):
            raise ValueError(
                f"{place} was initialised with {start!r}, which moves the base weights, so B @ A "
                "is not its delta; convert it first by saving with "
                "path_initial_model_for_weight_conversion"
            )
        return config

    def _checked_names(self, shapes: Mapping[str, list[int]]) -> list[str]:
        names, self.beside = [], dict[str, str]()
        for key, shape in shapes.items():
            if key.startswith(PREFIX) and self._is_beside(key):
                self.beside[key.removeprefix(PREFIX)] = self._stored[key]
                continue
            partner_A = f"{key.removesuffix(_SUFFIX_B)}{_SUFFIX_A}"
            if key.endswith(_SUFFIX_B) and key.startswith(PREFIX) and partner_A in shapes:
                continue
            if not (key.endswith(_SUFFIX_A) and key.startswith(PREFIX)):
                raise ValueError(
                    f"it holds {key}, which is not one of a pair lora_A, lora_B of a linear layer; "
                    f"{_LINEAR_ONLY}"
                )
            name = key.removeprefix(PREFIX).removesuffix(_SUFFIX_A)
            partner = shapes.get(lora_key(name, "B"))
            if partner is not None and len(shape) == len(partner) > 2:
                raise ValueError(f"layer {name} is a convolution; {_LINEAR_ONLY}")
            if partner is None or len(shape) != 2 or len(partner) != 2 or partner[1] != shape[0]:
                raise ValueError(
                    f"lora_A {shape} and lora_B {partner} of layer {name} do not form a product of "
                    "two matrices"
                )
            if shape[0] != self._rank_of(name):
                raise ValueError(
                    f"lora_A of layer {name} has rank {shape[0]}, but {CONFIG_NAME} says "
                    f"{self._rank_of(name)}: not the configuration of these weights?"
                )
            names.append(name)
        if not names:
            raise ValueError("it holds no LoRA layer")
        return sorted(names, key=natural_order)

    def _is_beside(self, key: str) -> bool:
        if key.endswith(_MAGNITUDE):
            return self._with_beside
        return key.endswith(_BIAS) or not any(part.startswith("lora_") for part in key.split("."))

    def _config_without_wrappers(self) -> dict[str, Any]:
        patterns = {}
        for option, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            values = {name: self._of_layer(option, usual, name) for name in self.names}
            patterns[option] = {n: v for n, v in values.items() if v != self.config[usual]}
        return unwrapped_config(self.config, self.names, patterns)

    def _pattern_values(self) -> dict[str, PatternValues]:
        patterns = ("rank_pattern", "alpha_pattern")
        return {option: PatternValues(self.config.get(option)) for option in patterns}

    def _of_layer(self, option: str, usual: str, name: str) -> Any:
        spelled, _, _ = spelled_in_peft(self.stored_key(name, "A")).partition(".lora_A")
        return self._values[option](name, self.config[usual], spelled=spelled)

    def _rank_of(self, name: str) -> int:
        return self._of_layer("rank_pattern", "r", name)

    def stored_key(self, name: str, part: Literal["A", "B"]) -> str:
        """The key of `lora_A` or `lora_B` of a layer in the file, with what wrappers add."""
        return self._stored[lora_key(name, part)]

    def scaling_of(self, name: str) -> float:
        """The factor before B @ A: alpha over the rank, or over its root with rslora."""
        alpha = self._of_layer("alpha_pattern", "lora_alpha", name)
        rank = self._rank_of(name)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def __getitem__(self, name: str) -> LoraProduct:
        if name not in self:
            raise KeyError(name)
        with self._reader.opened() as file:
            lora_A, lora_B = (file.tensor(self.stored_key(name, part)) for part in _PARTS)
            for part, weight in (("lora_A", lora_A), ("lora_B", lora_B)):
                if not torch.isfinite(weight).all():
                    raise ValueError(f"{part} of layer {name} has NaN or infinite entries")
        wide = torch.promote_types(lora_A.dtype, lora_B.dtype)
        return LoraProduct(lora_A.to(wide), lora_B.to(wide), self.scaling_of(name))
