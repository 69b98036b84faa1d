"""`svdinit resize`: adapters to another rank, format-preserving, with the error of every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .. import adapters, factors
from .paths import refuse_file
from .summary import say


@dataclass(frozen=True)
class ResizeOptions:
    """Give LoRA, LoHa or LoKr adapters another rank, or make one LoRA of several.

    The output is a LoRA in the style of the input: PEFT folder, kohya or diffusers file.
    """

    _known_as: ClassVar = {"adapter": ["adapters"]}

    adapter: list[str] = field(
        metadata={"help": "PEFT folder, kohya, LyCORIS or diffusers file, or Hub id; or several."}
    )
    output: str = field(
        metadata={"help": "Folder for a PEFT adapter; for a file, another file .safetensors."}
    )
    rank: int | None = field(default=None, metadata={"help": "One rank for all layers."})
    energy: float | None = field(
        default=None, metadata={"help": "Or the share of each layer's squared norm to keep."}
    )
    error: float | None = field(
        default=None, metadata={"help": "Or the largest relative Frobenius error of each layer."}
    )
    max_parameters: int | None = field(
        default=None, metadata={"help": "Or a budget, spent where it keeps most energy."}
    )
    max_rank: int | None = field(default=None, metadata={"help": "Upper bound of all ranks."})
    uniform_rank: bool = field(
        default=False, metadata={"help": "One rank for all layers; smaller ones padded by zeros."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per adapter of the sum; 1 each by default."}
    )
    dtype: adapters.Dtype | None = field(
        default=None, metadata={"help": "Of the output; by default that of the input."}
    )

    def __post_init__(self) -> None:
        self.rule  # noqa: B018 - a wrong rule is refused before any work

    @property
    def rule(self) -> factors.RankRule:
        return factors.RankRule(
            rank=self.rank,
            energy=self.energy,
            error=self.error,
            max_parameters=self.max_parameters,
            max_rank=self.max_rank,
            uniform=self.uniform_rank,
        )


def run(options: ResizeOptions) -> None:
    refuse_file(Path(options.output).parent, "output")
    resized = adapters.resize(
        options.adapter,
        options.output,
        options.rule,
        weights=options.weights,
        dtype=options.dtype,
        progress=True,
    )
    say(resized.summary())
