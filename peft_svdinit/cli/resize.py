"""`svdinit resize`: adapters to another rank, format-preserving, with the error of every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from .. import adapters, factors
from .paths import refuse_file

_WORST = 5


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
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of the output; by default that of the input."}
    )

    def __post_init__(self) -> None:
        self.target  # noqa: B018 - a wrong target is refused before any work
        if self.weights is not None and len(self.weights) != len(self.adapter):
            raise ValueError(
                f"weights must be one per adapter, got {len(self.weights)} for {len(self.adapter)}"
            )

    @property
    def target(self) -> factors.RankTarget:
        return factors.RankTarget(
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
        options.target,
        weights=options.weights,
        dtype=options.dtype,
        progress=True,
    )
    print("\n".join(_summary(resized)))


def _summary(resized: adapters.Resized) -> list[str]:
    ranks = [layer.rank for layer in resized.layers]
    spread = f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    before, after = resized.parameters_before, resized.parameters
    lines = [
        f"{len(ranks)} layers, rank {spread}; {after:,} of {before:,} parameters; "
        f"{resized.energy:.2%} of the energy, relative error {resized.relative_error:.2e}.",
        f"{'worst layers':<60} {'rank':>10} {'energy':>8} {'error':>9} {'rounding':>9}",
    ]
    worst = sorted(resized.layers, key=lambda layer: -layer.relative_error)[:_WORST]
    for layer in worst:
        lines.append(
            f"{layer.name[-60:]:<60} {f'{layer.rank_before} > {layer.rank}':>10} "
            f"{layer.energy:8.2%} {layer.relative_error:9.2e} {layer.rounding_error:9.2e}"
        )
    if resized.zero_layers:
        lines.append(f"{len(resized.zero_layers)} layers have a zero delta and keep zeros.")
    if resized.only_in_some:
        lines.append(
            f"{len(resized.only_in_some)} layers are in some of the adapters only; see the report."
        )
    return [*lines, f"Adapter: {resized.output}"]
