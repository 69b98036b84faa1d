"""Configurations that are saved as the stock LoRA that their adapter is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import LoraConfig

from ..atomic import write_json

SIDECAR_NAME = "svdinit_config.json"
_KIND = "config_class"
_Config = TypeVar("_Config", bound="StockSavedConfig")


@dataclass
class StockSavedConfig(LoraConfig):
    """A LoraConfig with a start of its own, saved as a stock one with a sidecar beside it."""

    init_marker: ClassVar[str]
    """`init_lora_weights` of the configuration in memory. Stock PEFT refuses this value by name,
    where it would silently start at random from True: in a mixed model, say."""

    def mark(self) -> None:
        """Put the marker into `init_lora_weights`.

        Raises:
            ValueError: if it asks for another start, or an option replaces LoRA's update.
        """
        if self.init_lora_weights not in (True, self.init_marker):
            raise ValueError(
                f"init_lora_weights must stay True in a {type(self).__name__}, which initialises "
                f"the adapter, got {self.init_lora_weights!r}"
            )
        others = ", ".join(_other_variants(self))
        if others:
            raise ValueError(
                f"{others} cannot be combined with a {type(self).__name__}: the update of the "
                "layers would not be B A; leave one of the two out"
            )
        self.init_lora_weights = self.init_marker  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def as_stock_start(self) -> Iterator[None]:
        """While PEFT creates the layers, let it give them its default start."""
        self.init_lora_weights = True
        try:
            yield
        finally:
            self.init_lora_weights = self.init_marker  # pyright: ignore[reportAttributeAccessIssue]

    def stock(self) -> LoraConfig:
        """The LoraConfig of the saved adapter."""
        return LoraConfig(**{**lora_options(self), "init_lora_weights": True})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` of a stock LoRA and the sidecar with all options."""
        self.stock().save_pretrained(save_directory, **kwargs)
        options = {key: value for key, value in asdict(self).items() if key != "runtime_config"}
        options = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
        write_json(Path(save_directory) / SIDECAR_NAME, {_KIND: type(self).__name__, **options})

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> _Config:
        """The config that an adapter folder was saved with, from its sidecar.

        Raises:
            ValueError: if the folder has no sidecar of this class; LoraConfig.from_pretrained reads
                any adapter.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "", SIDECAR_NAME)
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {SIDECAR_NAME}: it was not saved by a {cls.__name__}, or it "
                "is not a local folder; LoraConfig.from_pretrained reads it as the stock LoRA it is"
            )
        options = json.loads(path.read_text(encoding="utf-8"))
        kind = options.pop(_KIND, None)
        if kind != cls.__name__:
            raise ValueError(f"{path.parent} was saved by a {kind}, not by a {cls.__name__}")
        return cls(**options)


def _other_variants(config: LoraConfig) -> list[str]:
    """Options in use that replace LoRA's update; under DoRA and aLoRA it still begins at B A."""
    return [
        entry.name
        for entry in fields(LoraConfig)
        if entry.metadata.get("is_lora_variant")
        and entry.name not in ("use_dora", "alora_invocation_tokens")
        and getattr(config, entry.name)
    ]


def lora_options(config: LoraConfig) -> dict[str, Any]:
    """What a LoraConfig was made with, the fields of subclasses left out."""
    return {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig) if entry.init}
