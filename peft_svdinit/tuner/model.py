"""PEFT's LoRA tuner with starts of our own."""

from __future__ import annotations

import logging
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from ..models import refuse_misread_config
from .adapter_layers import adapter_dtypes, weight_keys
from .config.alias import config_for
from .config.lori import LoriConfig
from .config.stock_saved import StockSavedConfig
from .config.svd import SvdLoraConfig
from .layers.reference import stacked_factors
from .lori_start import LoriStart
from .sparse_form import densify, renamed, restore_projections, sparsify
from .stacked_form import references, unstack
from .svd_start import SvdStart

logger = logging.getLogger(__name__)

_BARE_BASE = (
    "Adapter %r changes the model from its start on, and is disabled in training: what is left is "
    "the bare base. A trainer with a reference model, as TRL's DPOTrainer with peft_config, takes "
    "that for the reference in place of the start: give it model=get_peft_model(base, config) and "
    "no peft_config, or a ref_model"
)


class SvdLoraModel(LoraModel):
    """LoraModel that knows our configurations and their aliases; for any other it is a LoraModel.

    See `settle` for when an object is of which class.
    """

    _just_started: tuple[str, SvdStart | LoriStart] | None = None
    """The adapter whose weights nobody has touched since they were initialised, and by what."""

    _said_what_base_is = False

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        options = (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        given = cast(LoraConfig, self.peft_config[adapter_name])
        if state_dict is not None and given.inference_mode is None:
            given.inference_mode = False  # As those do who load saved weights, see SvdLoraConfig.
        loading = state_dict is not None or bool(given.inference_mode)
        try:
            config = config_for(given, loading=loading)
            self.peft_config[adapter_name] = config
            if isinstance(config, StockSavedConfig):
                self._start(config, model, adapter_name, *options)
            else:
                super().inject_adapter(model, adapter_name, *options)
        except Exception:
            settle(self, leaving=adapter_name)
            raise
        settle(self)

    def _start(
        self, config: StockSavedConfig, model: nn.Module, adapter_name: str, *options: Any
    ) -> None:
        refuse_misread_config(model, config)
        start = _start_of(config)
        active = self.active_adapter
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with config.as_stock_start():
                super().inject_adapter(model, adapter_name, *options)
            start(self.model, adapter_name)
        except Exception:
            self._remove(adapter_name)
            self.active_adapter = active
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise
        self._just_started = (adapter_name, start)

    def disable_adapter_layers(self) -> None:
        """As of every LoraModel; says once that the bare base is not where training began."""
        if self.model.training and not self._said_what_base_is:
            for name in self.active_adapters:
                config = self.peft_config[name]
                if isinstance(config, StockSavedConfig) and not config.begins_at_base:
                    logger.warning(_BARE_BASE, name)
                    self._said_what_base_is = True
        super().disable_adapter_layers()

    def _remove(self, adapter_name: str) -> None:
        if set(self.peft_config) == {adapter_name}:
            self.unload()
        else:
            self.delete_adapter(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        before = adapter_dtypes(self.model, adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        started, self._just_started = self._just_started, None
        if started is None or started[0] != adapter_name:
            return
        # PEFT creates adapters in the base's half precision and widens them here: initialise
        # again, or the start keeps the rounding.
        if before != adapter_dtypes(self.model, adapter_name):
            started[1](self.model, adapter_name)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        for name in adapters:
            if references(self.model, name):
                raise ValueError(
                    f'adapters: {name!r} starts as svd_start="reference", whose update is not B A '
                    "alone; save it and load it as the stock LoRA it is saved as, then combine that"
                )
        config = self.peft_config.get(next(iter(adapters), ""))
        if not isinstance(config, StockSavedConfig):
            super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        # The new adapter gets a copy of the first one's config and must not start as that one did.
        self.peft_config[adapters[0]] = config.stock()
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config[adapters[0]] = config
            settle(self)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: nn.Module, peft_config: LoraConfig, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        if isinstance(peft_config, StockSavedConfig):
            raise ValueError(
                "path_initial_model_for_weight_conversion subtracts what an initialisation took "
                f"from the base weights, and a {type(peft_config).__name__} takes nothing: save "
                "without it"
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
        for name, layer in references(model, adapter_name).items():
            keys = weight_keys(name, adapter_name)
            # Processes other than the main one are given no tensors in sharded training.
            if tensors.keys() >= set(keys):
                stacked = stacked_factors(layer, adapter_name, *(tensors[key] for key in keys))
                tensors.update(zip(keys, stacked, strict=True))
        densify(tensors, model, adapter_name)
        if isinstance(config, LoriConfig):
            restore_projections(tensors, model, adapter_name, config.lori_seed)
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
            model, config, adapter_name, renamed(state_dict, model, adapter_name)
        )
        # A teacher's factors can be another's; a weight's own are the same but for rounding.
        checked = not (isinstance(config, SvdLoraConfig) and config.svd_source == "weight")
        for name, layer in references(model, adapter_name).items():
            unstack(tensors, name, layer, adapter_name, checked=checked)
        if isinstance(config, LoriConfig):
            sparsify(tensors, model, adapter_name, config.lori_seed)
        return tensors


def settle(tuner: Any, *, leaving: str | None = None) -> None:
    """Make a LoRA tuner a `SvdLoraModel` while it has an adapter of ours, else PEFT's `LoraModel`.

    A model whose adapters are all stock says so to whoever asks for its class, and is pickled
    without a name of ours.

    Args:
        tuner: any module; only these two classes are changed.
        leaving: an adapter that does not count.
    """
    if type(tuner) in (LoraModel, SvdLoraModel):
        configs = cast(LoraModel, tuner).peft_config
        ours = (isinstance(configs[name], StockSavedConfig) for name in configs if name != leaving)
        tuner.__class__ = SvdLoraModel if any(ours) else LoraModel


def _start_of(config: StockSavedConfig) -> SvdStart | LoriStart:
    """What the configuration asks for; a bad file is refused before the model is touched."""
    if isinstance(config, LoriConfig):
        return LoriStart(config)
    return SvdStart(cast(SvdLoraConfig, config))
