"""`svdinit analyze`: numbers and figures of factors or of an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ..deltas import LoraAdapter
from ..extraction import factors_of_adapter
from ..factors_file import FactorsFile
from ..teacher_files import write_factors_analysis
from .summary import print_analysis


@dataclass(frozen=True)
class AnalyzeOptions:
    """Analyse factors or an adapter at a rank: energy, error, spectra, recommended ranks."""

    output_dir: str = field(metadata={"help": "Folder for the reports and the figure."})
    factors: str | None = field(default=None, metadata={"help": "Factors file, folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "Or a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank to analyse at."})
    energy: float = field(default=0.9, metadata={"help": "Energy aimed at by recommended ranks."})
    max_parameters: int | None = field(
        default=None, metadata={"help": "Their budget; by default that of the uniform lora_r."}
    )
    plots: bool = field(default=True, metadata={"help": "Draw the figure."})

    def __post_init__(self) -> None:
        if bool(self.factors) == bool(self.adapter):
            raise ValueError("give either factors or adapter")


def run(options: AnalyzeOptions) -> None:
    if options.factors:
        file = FactorsFile(options.factors)
        factors, metadata = file, file.metadata
    else:
        extraction = factors_of_adapter(LoraAdapter(str(options.adapter)))
        factors, metadata = extraction.factors, extraction.metadata
    analysis = write_factors_analysis(
        factors,
        options.output_dir,
        rank=options.lora_r,
        source=asdict(metadata),
        energy=options.energy,
        max_parameters=options.max_parameters,
        plots=options.plots,
    )
    print_analysis(analysis, options.output_dir)
