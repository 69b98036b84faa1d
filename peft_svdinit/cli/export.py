"""`svdinit export`: from factors to a stock LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..embedded import resolve_model
from ..export import export_adapter
from ..factors_file import FactorsFile


@dataclass(frozen=True)
class ExportOptions:
    """Write factors, truncated to a rank, as a LoRA adapter that stock PEFT loads."""

    factors: str = field(metadata={"help": "Factors file, folder or Hub id."})
    output_dir: str = field(metadata={"help": "Folder of the adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    base: str | None = field(
        default=None, metadata={"help": "Base model; with it target modules get short names."}
    )
    split: Literal["output", "balanced"] = field(
        default="output", metadata={"help": "Singular values into B, or their root into A and B."}
    )


def run(options: ExportOptions) -> None:
    file = FactorsFile(options.factors)
    base = resolve_model(options.base) if options.base else None
    folder = export_adapter(
        file,
        options.lora_r,
        options.output_dir,
        base_model_name_or_path=base or file.metadata.base_model_name_or_path,
        base=base,
        split=options.split,
    )
    print(f"Adapter of rank {options.lora_r} for {len(file)} layers: {folder}")
