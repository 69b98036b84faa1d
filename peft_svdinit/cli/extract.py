"""`svdinit extract`: from an adapter or a pair of checkpoints to factors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..deltas import CheckpointPair, LoraAdapter
from ..embedded import resolve_model
from ..extraction import factors_of_adapter, factors_of_checkpoints
from ..teacher_files import write_teacher
from .summary import print_analysis


@dataclass(frozen=True)
class ExtractOptions:
    """Take the SVD of a fine-tune's delta (tuned − base) or an adapter's, and write its factors."""

    output_dir: str = field(metadata={"help": "Folder for the factors and reports."})
    base: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model before fine-tuning."}
    )
    tuned: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model after fine-tuning."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "A LoRA adapter, in place of tuned."}
    )
    rank: int = field(default=64, metadata={"help": "Triplets kept per layer of a pair."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or name endings of the layers of a pair, or all-linear."},
    )
    method: Literal["exact", "randomized"] = field(
        default="randomized", metadata={"help": "SVD of the dense deltas of a pair."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    lora_r: int = field(default=16, metadata={"help": "Student rank of the analysis."})
    plots: bool = field(default=True, metadata={"help": "Draw the figures."})

    def __post_init__(self) -> None:
        if bool(self.tuned) == bool(self.adapter):
            raise ValueError("give either tuned (with base) or adapter")
        if self.tuned and not self.base:
            raise ValueError("tuned needs base, the model before fine-tuning")
        if self.lora_r > self.rank:
            raise ValueError(f"lora_r={self.lora_r} must not be above rank={self.rank}")


def run(options: ExtractOptions) -> None:
    notes = {}
    base = resolve_model(options.base) if options.base else None
    if options.adapter:
        extraction = factors_of_adapter(LoraAdapter(options.adapter), base=base)
    else:
        targets = options.target_modules
        pair = CheckpointPair(
            str(base),
            str(options.tuned),
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        )
        extraction = factors_of_checkpoints(
            pair,
            options.rank,
            base_model_name_or_path=str(options.base),
            method=options.method,
            seed=options.seed,
        )
        notes["uncovered"] = {tensor.key: tensor.relative_change for tensor in pair.uncovered()}
    held = min(layer.rank for layer in extraction.factors.values())
    analysis = write_teacher(
        extraction,
        options.output_dir,
        rank=min(options.lora_r, held),
        notes=notes,
        plots=options.plots,
    )
    print_analysis(analysis, options.output_dir)
    if notes.get("uncovered"):
        print(
            f"Not covered: {len(notes['uncovered'])} changed tensors outside the linear layers "
            "(embeddings, norms); they are listed in the report."
        )
