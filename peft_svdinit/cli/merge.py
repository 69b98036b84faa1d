"""`svdinit merge`: several adapters as one, with its error and the interference of each pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .. import adapters
from .paths import refuse_file
from .summary import say


@dataclass(frozen=True)
class MergeOptions:
    """Merge LoRA adapters: exactly, recompressed, or by PEFT's linear, TIES and DARE.

    The error against the exact weighted sum is measured, and the interference of each pair.
    """

    _known_as: ClassVar = {"adapter": ["adapters"]}

    adapter: list[str] = field(metadata={"help": "PEFT LoRA folders or Hub ids, two at least."})
    output: str = field(metadata={"help": "Folder of the merged adapter and the reports."})
    method: adapters.Method = field(
        default="cat",
        metadata={
            "help": "cat: exact, ranks add up. shared: exact at one rank, for adapters with one A. "
            "svd: best approximation at rank. The others: PEFT's add_weighted_adapter."
        },
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per adapter; 1 each by default."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Of the result, for svd and the methods in _svd."}
    )
    density: float | None = field(
        default=None, metadata={"help": "Share of entries kept, for ties, dare, magnitude_prune."}
    )
    majority_sign_method: adapters.MajoritySign | None = field(
        default=None, metadata={"help": "How ties elects signs; total by default."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Of the entries that dare drops; 0 by default."}
    )
    dtype: adapters.Dtype | None = field(
        default=None, metadata={"help": "Of the output; by default that of the inputs."}
    )

    def __post_init__(self) -> None:
        self.merge_method  # noqa: B018 - contradictory options are refused before any work

    @property
    def merge_method(self) -> adapters.MergeMethod:
        return adapters.MergeMethod(
            self.method, self.rank, self.density, self.majority_sign_method, self.seed
        )


def run(options: MergeOptions) -> None:
    refuse_file(options.output, "output")
    merged = adapters.merge(
        options.adapter,
        options.output,
        options.merge_method,
        weights=options.weights,
        dtype=options.dtype,
        progress=True,
    )
    say(merged.summary())
