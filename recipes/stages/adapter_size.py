"""The options that every LoRA has: rank, scaling, dropout, layers."""

from __future__ import annotations

from typing import Protocol


class AdapterSize(Protocol):
    """Options with the fields that `check_size` looks at."""

    @property
    def lora_r(self) -> int: ...
    @property
    def lora_alpha(self) -> int: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def lora_target_modules(self) -> list[str] | None: ...


def check_size(options: AdapterSize) -> None:
    """Raise ValueError for a rank, scaling, dropout or choice of layers that no LoRA has."""
    if options.lora_r < 1 or options.lora_alpha <= 0:
        raise ValueError(
            f"lora_r and lora_alpha must be positive, got {options.lora_r} and {options.lora_alpha}"
        )
    if not 0 <= options.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {options.lora_dropout}")
    if options.lora_target_modules == []:
        raise ValueError("lora_target_modules must name a layer, or be all-linear, got []")
