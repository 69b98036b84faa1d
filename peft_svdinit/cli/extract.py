"""`svdinit extract`: from a pair of checkpoints to an adapter, or from a teacher to factors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .. import adapters, analysis, factors
from .paths import model_source, refuse_file
from .summary import print_analysis, say

_DEFAULT_RANK, _DEFAULT_MAX_RANK = 64, 128
_OF_ADAPTERS = set(
    "energy error max_parameters max_bytes max_rank uniform_rank split dtype modules_to_save "
    "verify dry_run".split()
)
_OF_FACTORS = {"lora_r", "plots"}


@dataclass(frozen=True)
class ExtractOptions:
    """Take the low-rank part of a fine-tune (tuned − base) as a LoRA adapter or as factors."""

    output_dir: str = field(
        metadata={"help": "Folder of the adapter, or of factors and reports.", "aliases": ["--out"]}
    )
    base: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model before fine-tuning."}
    )
    tuned: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model after fine-tuning."}
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of base on the Hub."}
    )
    tuned_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of tuned on the Hub."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "A LoRA adapter in place of tuned, taken as factors."}
    )
    save_as: Literal["adapter", "factors"] = field(
        default="adapter",
        metadata={"help": "Of a pair: a stock LoRA adapter, or factors that SvdLoraConfig reads."},
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of every layer; 64 if nothing else is said."}
    )
    energy: float | None = field(
        default=None, metadata={"help": "Or the share of each layer's energy to keep."}
    )
    error: float | None = field(
        default=None, metadata={"help": "Or the relative Frobenius error of each layer to meet."}
    )
    max_parameters: int | None = field(
        default=None,
        metadata={"help": "Or the parameters of the whole adapter, spread to the best use."},
    )
    max_bytes: int | None = field(default=None, metadata={"help": "Or its bytes, likewise."})
    max_rank: int | None = field(
        default=None, metadata={"help": "Most of any layer, for all rules but rank; 128."}
    )
    uniform_rank: bool = field(
        default=False,
        metadata={"help": "Pad all layers to one rank, for servers that know no rank_pattern."},
    )
    split: Literal["output", "balanced"] = field(
        default="output", metadata={"help": "Singular values into B, or their root into A and B."}
    )
    dtype: adapters.Dtype = field(
        default="float32", metadata={"help": "Of the adapter; the rounding error is reported."}
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or endings of the layers of a pair, all-linear, or one regex."},
    )
    exclude_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or endings of modules that are not compared, or one regex."},
    )
    slice_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules whose vocabulary grew: only the base's rows are read."},
    )
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "Embeddings and norms to store whole, by name or ending, or: changed."},
    )
    verify: Literal["full", "layers", "none"] = field(
        default="full",
        metadata={
            "help": "full: reload through stock PEFT, compare every layer, and run the models on a "
            "little text; layers: without the text; none."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Only say what would be read, written and needed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD."})
    device: str = field(default="cpu", metadata={"help": "Where the SVD runs: cpu, cuda, cuda:1."})
    read_ahead: int = field(
        default=1, metadata={"help": "Deltas read while one is factorised, each in memory."}
    )
    lora_r: int = field(default=16, metadata={"help": "Of factors: student rank of the analysis."})
    plots: bool = field(default=True, metadata={"help": "Of factors: draw the figures."})

    def __post_init__(self) -> None:
        if bool(self.tuned) == bool(self.adapter):
            raise ValueError("give either tuned (with base) or adapter")
        if self.tuned and not self.base:
            raise ValueError("tuned needs base, the model before fine-tuning")
        for name in ("read_ahead", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._refuse_what_does_not_apply()
        rank = self.rule().rank
        if self.save_as == "factors" and not self.adapter:
            if rank is None:
                raise ValueError("factors have one rank; give rank, or save_as=adapter")
            if rank < self.lora_r:
                raise ValueError(f"lora_r={self.lora_r} must not be above rank={rank}")

    def _refuse_what_does_not_apply(self) -> None:
        other = _OF_ADAPTERS if self.save_as == "factors" else _OF_FACTORS
        kind, known = f"save_as={self.save_as}", {entry.name for entry in fields(self)} - other
        if self.adapter:
            kind, known = "adapter", {"output_dir", "base", "adapter", "save_as", "lora_r", "plots"}
        for entry in fields(self):
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            if entry.name not in known and getattr(self, entry.name) != default:
                raise ValueError(f"{entry.name} does not apply to {kind}; leave it out")

    def rule(self) -> factors.RankRule:
        """What is said about ranks."""
        budget = self.max_parameters
        if self.max_bytes is not None:
            if budget is not None:
                raise ValueError("max_parameters and max_bytes exclude each other")
            size = adapters.BYTES[self.dtype]
            if self.max_bytes < size:
                raise ValueError(
                    f"max_bytes must be at least {size}, one parameter of {self.dtype}, got "
                    f"{self.max_bytes}"
                )
            budget = self.max_bytes // size
        alone = (self.energy, self.error, budget) == (None, None, None)
        return factors.RankRule(
            rank=_DEFAULT_RANK if self.rank is None and alone else self.rank,
            energy=self.energy,
            error=self.error,
            max_parameters=budget,
            max_rank=_DEFAULT_MAX_RANK if self.max_rank is None and not alone else self.max_rank,
            uniform=self.uniform_rank,
        )

    def pair(self) -> factors.CheckpointPair:
        """The two checkpoints."""
        return factors.CheckpointPair(
            model_source(str(self.base)),
            model_source(str(self.tuned), "tuned"),
            target_modules=_choice(self.target_modules),
            exclude_modules=_choice(self.exclude_modules),
            slice_modules=_choice(self.slice_modules),
            base_revision=self.base_revision,
            tuned_revision=self.tuned_revision,
        )


def _choice(names: list[str]) -> str | list[str]:
    """A single name with the signs of a regular expression is one."""
    single = names[0] if len(names) == 1 else ""
    return single if single == "all-linear" or set(single) & set("*\\|(+?[^$") else names


def run(options: ExtractOptions) -> None:
    refuse_file(options.output_dir, "output_dir")
    try:
        _run(options)
    except ValueError as error:
        if options.max_bytes is None or not str(error).startswith("max_parameters "):
            raise
        raise ValueError(
            f"max_bytes={options.max_bytes} are {options.rule().max_parameters:,} parameters of "
            f"{options.dtype}: {error}"
        ) from error


def _run(options: ExtractOptions) -> None:
    if options.adapter:
        base = model_source(options.base) if options.base else None
        teacher = factors.factors_of_adapter(factors.LoraAdapter(options.adapter), base=base)
        return _write_factors(teacher, options, {})
    pair, rule = options.pair(), options.rule()
    form = adapters.AdapterForm(
        split=options.split,
        dtype=options.dtype,
        modules_to_save=options.modules_to_save,
        verify=options.verify,
    )
    how: dict[str, Any] = {"device": options.device, "read_ahead": options.read_ahead}
    if options.dry_run:
        say(adapters.estimate(pair, rule, form, options.output_dir, **how).as_text())
    elif options.save_as == "factors":
        _factors(pair, rule, options)
    else:
        extracted = adapters.extract_adapter(
            pair,
            options.output_dir,
            rule,
            form,
            base_model_name_or_path=str(options.base),
            base_model_revision=options.base_revision,
            seed=options.seed,
            **how,
        )
        say(f"{extracted.as_text()}\nAdapter: {extracted.folder}")


def _factors(pair: factors.CheckpointPair, rule: factors.RankRule, options: ExtractOptions) -> None:
    factorise = adapters.factorisation(rule, seed=options.seed, device=options.device)
    target = Path(options.output_dir).expanduser().resolve()
    job = adapters.factorised(pair, target, factorise, read_ahead=options.read_ahead)
    with job as (store, unchanged):
        adapters.stored_spectra(store, pair)
        metadata = factors.FactorsMetadata(
            base_model_name_or_path=options.base,
            base_model_revision=options.base_revision,
            source=pair.source,
            method="auto",
            seed=options.seed,
        )
        uncovered = {tensor.key: tensor.relative_change for tensor in pair.uncovered()}
        unchanged()
        extraction = factors.Extraction(store, metadata, factors.checkpoint_samples(pair))
        _write_factors(extraction, options, {"uncovered": uncovered})
    if uncovered:
        say(
            f"Not covered: {len(uncovered)} changed tensors outside the linear layers "
            "(embeddings, norms); they are listed in the report."
        )


def _write_factors(extraction: factors.Extraction, options: ExtractOptions, notes: dict) -> None:
    rank = min(options.lora_r, *(layer.rank for layer in extraction.factors.values()))
    written = analysis.write_teacher(
        extraction, options.output_dir, rank=rank, notes=notes, plots=options.plots
    )
    print_analysis(written, options.output_dir)
