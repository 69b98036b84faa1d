"""`svdinit export`: from factors, or a compact LoRI adapter, to a stock LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .. import adapters, factors, linalg, masks, models
from .paths import model_source, refuse_file
from .summary import say

_DEFAULT_RANK = 16


@dataclass(frozen=True)
class ExportOptions:
    """Write factors, or a compact LoRI adapter, as a LoRA adapter that stock PEFT loads."""

    output_dir: str = field(metadata={"help": "Folder of the adapter."})
    factors: str | None = field(
        default=None, metadata={"help": "Factors file, folder or Hub id, truncated to a rank."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Or a compact LoRI adapter: lori_adapter.safetensors, its folder or Hub id; "
            "with compact, the folder of a LoRI adapter."
        },
    )
    compact: bool = field(
        default=False,
        metadata={
            "help": "The other way round: write the LoRI adapter as lori_adapter.safetensors, its "
            "mask, trained entries and seed alone."
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": f"Rank of the adapter; {_DEFAULT_RANK} if energy is not given either."},
    )
    energy: float | None = field(
        default=None,
        metadata={
            "help": "In place of lora_r: give each layer the smallest rank that keeps this share "
            "of its delta's squared Frobenius norm, 0.9 say."
        },
    )
    uniform_rank: bool = field(
        default=False,
        metadata={
            "help": "One rank for all layers, smaller ones padded with zeros, as servers such as "
            "vLLM want; give base too, for short names of the target modules."
        },
    )
    dtype: adapters.Dtype | None = field(
        default=None,
        metadata={
            "help": "Precision of the weights; float32 by default, bfloat16 of a compact adapter."
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model; with it target modules get short names."}
    )
    split: Literal["output", "balanced"] = field(
        default="output",
        metadata={
            "help": "Singular values into B, or their root into A and B, which suits half "
            "precision better."
        },
    )

    def __post_init__(self) -> None:
        if (self.factors is None) == (self.adapter is None):
            raise ValueError("give either factors or adapter")
        if self.adapter is None and self.compact:
            raise ValueError("compact needs adapter, the folder of a LoRI adapter")
        of_factors = ("lora_r", "energy", "uniform_rank", "base")
        beside = [name for name in of_factors if getattr(self, name) not in (None, False)]
        if self.adapter is not None and (beside or self.split != "output"):
            raise ValueError(
                f"{', '.join(beside) or 'split'} belongs to factors: an adapter keeps its rank"
            )
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.lora_r is not None and self.energy is not None:
            raise ValueError("lora_r and energy exclude each other; give one of them")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")


def run(options: ExportOptions) -> None:
    if not options.compact:  # which may be written to a file by name
        refuse_file(options.output_dir, "output_dir")
    if options.factors is not None:
        _export_factors(options, options.factors)
    elif options.adapter is not None:
        _export_adapter(options, options.adapter)


def _export_adapter(options: ExportOptions, adapter: str) -> None:
    if options.compact:
        file = adapters.compact_adapter_folder(
            adapter, options.output_dir, dtype=options.dtype or "bfloat16"
        )
        say(f"Compact adapter of {file.stat().st_size:,} bytes: {file}")
        return
    compact = masks.load_compact(adapter)
    folder = adapters.write_stock_adapter(
        compact, options.output_dir, dtype=options.dtype or "float32"
    )
    mask = compact.mask
    say(
        f"Stock LoRA of {len(mask.layers)} layers, {mask.kept:,} of {mask.size:,} entries of B "
        f"not zero: {folder}"
    )


def _export_factors(options: ExportOptions, path: str) -> None:
    file = factors.FactorsFile(path)
    base = model_source(options.base) if options.base else None
    if options.energy is not None:
        ranks = {name: _rank_of(file, name, options.energy) for name in file}
    else:
        ranks = _DEFAULT_RANK if options.lora_r is None else options.lora_r
    architecture = file.metadata.source.get("architecture")
    skeleton = models.model_skeleton(base, architecture=architecture) if base else None
    # Without a base there is nothing to tell which heads the adapter would have to store.
    causal = not architecture or models.task_type_of(architecture, False) == "CAUSAL_LM"
    exported = adapters.export_adapter(
        file,
        ranks,
        options.output_dir,
        task_type="auto" if base or causal else None,
        base_model_name_or_path=base or file.metadata.base_model_name_or_path,
        base_model_revision=None if base else file.metadata.base_model_revision,
        base=skeleton,
        split=options.split,
        dtype=options.dtype or "float32",
        uniform=options.uniform_rank,
    )
    say(exported.summary())


def _rank_of(file: factors.FactorsFile, name: str, energy: float) -> int:
    layer = file[name]
    rank = linalg.rank_for_energy(layer.S, layer.norm, energy)
    if rank is None:
        raise ValueError(
            f"energy={energy}: the {layer.rank} triplets held for layer {name} keep "
            f"{layer.energy():.4f} of its delta; ask for less, or make factors of a higher rank"
        )
    return rank
