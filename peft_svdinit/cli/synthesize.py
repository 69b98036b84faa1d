"""`svdinit synthesize`: from a LoRA to a teacher of higher rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import analysis, factors
from .paths import model_source, refuse_file
from .summary import print_analysis


@dataclass(frozen=True)
class SynthesizeOptions:
    """Extend a LoRA's delta to a teacher of higher rank, and write its factors and analysis."""

    adapter: str = field(metadata={"help": "Folder or Hub id of a trained LoRA adapter."})
    output_dir: str = field(metadata={"help": "Folder for the teacher's factors and reports."})
    base: str | None = field(
        default=None,
        metadata={"help": "Base model; with it the factors recognise the model they are for."},
    )
    rank: int = field(default=64, metadata={"help": "Rank of the teacher."})
    tail_decay: float = field(default=0.1, metadata={"help": "Decay per appended singular value."})
    noise_share: float = field(
        default=0.1, metadata={"help": "Share of the appended energy that is noise."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all randomness."})
    lora_r: int = field(default=16, metadata={"help": "Student rank of the analysis."})
    plots: bool = field(default=True, metadata={"help": "Draw the figures."})

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")


def run(options: SynthesizeOptions) -> None:
    refuse_file(options.output_dir, "output_dir")
    adapter = factors.LoraAdapter(options.adapter)
    synthesis = factors.Synthesis(
        options.rank, options.tail_decay, options.noise_share, options.seed
    )
    base = model_source(options.base) if options.base else None
    extraction = factors.factors_of_adapter(adapter, synthesis=synthesis, base=base)
    original = {name: adapter[name].factors() for name in adapter}
    written = analysis.write_teacher(
        extraction, options.output_dir, rank=options.lora_r, original=original, plots=options.plots
    )
    print_analysis(written, options.output_dir)
