"""`svdinit analyze`: numbers and figures of factors, of an adapter or of a pair of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from tqdm import tqdm

from .. import analysis, factors, linalg, models
from .paths import model_source, refuse_file
from .summary import print_analysis

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnalyzeOptions:
    """Analyse a fine-tune, an adapter or factors: energy, error, spectra, spikes, best ranks."""

    output_dir: str = field(metadata={"help": "Folder for the reports and the figures."})
    factors: str | None = field(default=None, metadata={"help": "Factors file, folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "Or a LoRA adapter."})
    tuned: str | None = field(
        default=None, metadata={"help": "Or a fine-tuned model, folder or Hub id, with its base."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model before fine-tuning; with factors or an adapter optional: their "
            "norms are then also given relative to its weights."
        },
    )
    rank: int = field(default=64, metadata={"help": "Triplets computed per layer of a pair."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or name endings of the layers of a pair, or all-linear."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank to analyse at."})
    energy: float | None = field(
        default=None,
        metadata={
            "help": "Share of all energy that the recommended ranks aim at; without energy, error "
            "and max_parameters 0.9, within the parameters of the uniform lora_r."
        },
    )
    error: float | None = field(
        default=None, metadata={"help": "Or the relative error of all layers together."}
    )
    max_parameters: int | None = field(
        default=None, metadata={"help": "The most parameters of the recommended ranks."}
    )
    intruders: bool = field(
        default=False,
        metadata={"help": "Look for intruder dimensions (arXiv:2410.21228); needs base."},
    )
    plots: bool = field(default=True, metadata={"help": "Draw the figures."})

    def __post_init__(self) -> None:
        if [bool(self.factors), bool(self.adapter), bool(self.tuned)].count(True) != 1:
            raise ValueError("give either factors or adapter or tuned (with base)")
        if self.tuned and not self.base:
            raise ValueError("tuned needs base, the model before fine-tuning")
        if self.intruders and not self.base:
            raise ValueError("intruders needs base: they are directions that the base lacks")
        if self.energy is not None and self.error is not None:
            raise ValueError("give energy or error, not both: error is √(1 - energy)")
        for name in ("rank", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tuned and self.lora_r > self.rank:
            raise ValueError(f"lora_r={self.lora_r} must not be above rank={self.rank}")


@dataclass(frozen=True)
class _Subject:
    """Factors of the deltas, and where the base is at hand the weights before and after."""

    deltas: Mapping[str, factors.LowRankFactors]
    source: dict
    base: Mapping[str, Tensor] | None
    tuned: Callable[[str], Tensor] | None


def run(options: AnalyzeOptions) -> None:
    refuse_file(options.output_dir, "output_dir")
    subject = _checkpoints(options) if options.tuned else _factors(options)
    norms: dict[str, float] | None = None
    intruders: list[analysis.LayerIntruders] | None = None
    if subject.base is not None and subject.tuned is not None:
        norms, intruders = {}, [] if options.intruders else None
        for name in tqdm(subject.deltas, desc="Base weights", unit="layer", disable=None):
            weight = subject.base[name]
            norms[name] = linalg.frobenius_norm(weight)
            if intruders is not None:
                intruders.append(analysis.find_intruders(name, weight, subject.tuned(name)))
    written = analysis.write_factors_analysis(
        subject.deltas,
        options.output_dir,
        rank=options.lora_r,
        source=subject.source,
        energy=options.energy,
        error=options.error,
        max_parameters=options.max_parameters,
        base_norms=norms,
        intruders=intruders,
        plots=options.plots,
    )
    print_analysis(written, options.output_dir)


def _checkpoints(options: AnalyzeOptions) -> _Subject:
    targets = options.target_modules
    pair = factors.CheckpointPair(
        model_source(str(options.base)),
        model_source(str(options.tuned), "tuned"),
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    extraction = factors.factors_of_checkpoints(
        pair, options.rank, base_model_name_or_path=str(options.base)
    )
    return _Subject(
        extraction.factors, asdict(extraction.metadata), pair.base, pair.tuned.__getitem__
    )


def _factors(options: AnalyzeOptions) -> _Subject:
    base = model_source(options.base) if options.base else None
    if options.factors:
        held = factors.FactorsFile(options.factors)
        metadata = held.metadata
    else:
        extraction = factors.factors_of_adapter(
            factors.LoraAdapter(str(options.adapter)), base=base
        )
        held, metadata = extraction.factors, extraction.metadata
    if base is None:
        return _Subject(held, asdict(metadata), None, None)
    parameters = models.StoredParameters(models.Checkpoint(base, argument="base"))
    weights = models.LinearWeights(parameters, target_modules=list(held))
    if isinstance(held, factors.FactorsFile):
        weights.check_shapes({name: held.shape_of(name) for name in held})
        difference = models.first_difference(_base_entries(weights, held))
        if difference is not None:
            raise ValueError(
                f"base: the weights of {difference} in {options.base} are not those that the "
                "factors were taken from; give the model that they are of"
            )

    def tuned(name: str) -> Tensor:
        return weights[name] + held[name].dense()

    return _Subject(held, asdict(metadata), weights, tuned)


def _base_entries(
    weights: models.LinearWeights, held: factors.FactorsFile
) -> Iterator[tuple[str, Tensor, models.BaseSample]]:
    for name in held:
        sample = held.base_sample(name)
        if sample is not None:
            positions = sample.positions(held.shape_of(name))
            yield name, weights.entries(name, positions), sample
