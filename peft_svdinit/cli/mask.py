"""`svdinit mask`: which entries of B a LoRI adapter trains, made, drawn and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import analysis, factors, files, masks, models
from .paths import refuse_file
from .summary import say

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["magnitude", "teacher", "random", "gradient"]
# What each source reads; the first of them that is given is enough.
_READS = {
    "magnitude": ("adapter",),
    "teacher": ("factors",),
    "random": ("adapter", "factors"),
}


@dataclass(frozen=True)
class MaskOptions:
    """Make the mask of a LoRI adapter and draw it, or draw and compare masks that exist.

    LoRI (arXiv:2504.07448) trains a few entries of B over a frozen random A, which a seed draws.
    """

    output: str = field(metadata={"help": "Folder of the mask, the report and the figures."})
    source: Source | None = field(
        default=None,
        metadata={
            "help": "magnitude: the largest |B| of a trained adapter. teacher: of the best B for a "
            "teacher's factors, without training. random. Masks by gradients are made by "
            "recipes/train_lori.py."
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "PEFT folder or Hub id: a LoRI-D adapter (lori_density=1) for magnitude; for "
            "random any with the same layers."
        },
    )
    factors: str | None = field(default=None, metadata={"help": "Factors file, folder or Hub id."})
    rank: int | None = field(default=None, metadata={"help": "Of the adapter, with factors."})
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Of A. By default that of the adapter if it is LoRI's; 0 for teacher and "
            "random. Needed where A is another one."
        },
    )
    density: float | None = field(
        default=None, metadata={"help": "Share of B that is trained; 0.1 by default."}
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "What shares one budget: global (default), type, layer, matrix, row, N:M."
        },
    )
    floor: float | None = field(
        default=None, metadata={"help": "Share of every matrix kept in any case; 0 by default."}
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Masks, files or folders, none of whose entries is taken."},
    )
    show: list[str] = field(
        default_factory=list,
        metadata={
            "help": "In place of a source: masks, or adapters saved with one, to draw; several are "
            "compared, entry by entry and by their deltas."
        },
    )
    plots: bool = field(default=True, metadata={"help": "Draw the figures."})

    def __post_init__(self) -> None:
        if bool(self.show) == (self.source is not None):
            raise ValueError(
                "give either source, to make a mask, or show, to draw masks that exist"
            )
        if self.show:
            self._refuse("show", self._choosing())
            return
        if self.source == "gradient":
            raise ValueError(
                "source gradient needs the model and its data: run recipes/train_lori.py "
                "--mask_source gradient"
            )
        reads = _READS[str(self.source)]
        if not any(getattr(self, option) for option in reads):
            raise ValueError(f"source {self.source} needs {' or '.join(reads)}")
        others = {name for name in ("adapter", "factors") if getattr(self, name)} - set(reads)
        self._refuse(f"source {self.source}", others)
        if bool(self.factors) != (self.rank is not None) or (self.factors and self.adapter):
            raise ValueError("give factors and rank together, and no adapter beside them")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        self.selection  # noqa: B018 - refuses what cannot be selected

    @property
    def selection(self) -> masks.Selection:
        """How the mask is chosen, but for what it excludes."""
        given = {name: getattr(self, name) for name in ("density", "scope", "floor")}
        return masks.Selection(**{k: value for k, value in given.items() if value is not None})

    def _choosing(self) -> set[str]:
        """Options in use that say how a mask is made."""
        options = ("adapter", "factors", "rank", "seed", "density")
        given = {name for name in (*options, "scope", "floor") if getattr(self, name) is not None}
        return given | ({"exclude"} if self.exclude else set())

    @staticmethod
    def _refuse(what: str, options: set[str]) -> None:
        if options:
            raise ValueError(f"{what} does not use {', '.join(sorted(options))}; leave it out")


def run(options: MaskOptions) -> None:
    output = Path(options.output).expanduser()
    refuse_file(output, "output")
    if options.source is not None:
        _refuse_mask_in_use(output, options.exclude)
    if options.show:
        _show(options.show, output, options.plots)
        return
    exclude = [masks.load_mask(path, argument="exclude") for path in options.exclude]
    scores, lora_B = _scores(options)
    mask = scores.mask(replace(options.selection, exclude=exclude))
    with files.publishing(output, replaces=analysis.MASK_FIGURES) as folder:
        statistics = analysis.write_mask_report(mask, folder, lora_B=lora_B, plots=options.plots)
        path = masks.save_mask(folder, mask)
    say("\n".join(analysis.mask_in_words(mask, statistics)))
    say(f"Mask: {output / path.name}\nReport: {output / f'{analysis.REPORT}.md'}")


def _refuse_mask_in_use(output: Path, exclude: list[str]) -> None:
    """Raise ValueError if the mask to be written would replace an adapter's or one that is read."""
    if (output / masks.MASK_FILE_NAME).is_file() and (output / models.CONFIG_NAME).is_file():
        raise ValueError(
            f"output: {output} holds an adapter with its {masks.MASK_FILE_NAME}, which would be "
            "replaced by another; choose another folder"
        )
    written = (output / masks.MASK_FILE_NAME).resolve()
    for path in exclude:
        read = Path(path).expanduser().resolve()
        if written in (read, read / masks.MASK_FILE_NAME):
            raise ValueError(
                f"output must not be the folder of a mask in exclude, got {output}; choose another"
            )


def _scores(options: MaskOptions) -> tuple[masks.LayerScores, Mapping[str, Tensor] | None]:
    """What the mask is chosen by, and the B to measure it by."""
    if options.source == "magnitude":
        scores = masks.scores_of_adapter(str(options.adapter), options.seed)
        return scores, scores.scores
    rank, seed = options.rank or 0, options.seed or 0
    if options.source == "teacher":
        scores = masks.scores_of_teacher(str(options.factors), rank, seed)
        return scores, scores.scores
    if options.factors:
        file = factors.FactorsFile(options.factors)
        sizes = {name: file.shape_of(name) for name in file}
        shapes = {name: (out, rank) for name, (out, _) in sizes.items()}
        in_features = {name: inputs for name, (_, inputs) in sizes.items()}
        base = file.metadata.base_model_name_or_path
        return masks.LayerScores.random(shapes, in_features, seed, base), None
    adapter = factors.LoraAdapter(str(options.adapter))
    if options.seed is None:
        seed = masks.recorded_seed(adapter) or 0
    shapes, in_features = {}, {}
    for name, layer in adapter.items():
        out, in_features[name] = layer.shape
        shapes[name] = out, layer.lora_B.shape[1]
    base = adapter.config.get("base_model_name_or_path")
    scores = masks.LayerScores.random(shapes, in_features, seed, base)
    return scores, masks.SavedB(adapter)


def _show(paths: list[str], output: Path, plots: bool) -> None:
    shown, adapters = {}, {}
    for label, path in _labels(paths).items():
        shown[label] = masks.load_mask(path, argument="show")
        if not Path(path).expanduser().is_file():
            folder = files.resolve_folder(path, argument="show")
            if (folder / models.CONFIG_NAME).is_file():
                adapters[label] = factors.LoraAdapter(folder, argument="show")
    if len(shown) == 1:
        (label,) = shown
        lora_B = masks.SavedB(adapters[label]) if adapters else None
        statistics = analysis.write_mask_report(shown[label], output, lora_B=lora_B, plots=plots)
        say("\n".join(analysis.mask_in_words(shown[label], statistics)))
    else:
        deltas = {
            label: _reader(label, adapter, shown[label]) for label, adapter in adapters.items()
        }
        comparison = analysis.compare_masks(shown, deltas)
        analysis.write_mask_comparison(comparison, shown, output, plots=plots)
        say("\n".join(analysis.comparison_in_words(comparison)))
    say(f"Report: {output / f'{analysis.REPORT}.md'}")


def _labels(paths: list[str]) -> dict[str, str]:
    """Short names of the paths, whole ones where these would be ambiguous."""
    if len(set(paths)) < len(paths):
        raise ValueError("show names a path twice; give each mask once")
    names = {
        path: (Path(path).parent if Path(path).expanduser().is_file() else Path(path)).name
        for path in paths
    }
    counts = Counter(names.values())
    return {
        names[path] if names[path] and counts[names[path]] == 1 else path: path for path in paths
    }


def _reader(
    label: str, adapter: factors.LoraAdapter, mask: masks.LoriMask
) -> Callable[[str], analysis.Delta]:
    def read(name: str) -> analysis.Delta:
        layer = adapter[name] if name in adapter else None
        expected = mask.layers[name].mask.shape
        if layer is None or layer.lora_B.shape != expected:
            raise ValueError(
                f"show: layer {name} of {label} has a mask of shape {tuple(expected)}, but no such "
                "lora_B; is the mask that of another adapter?"
            )
        return layer.lora_B, layer.lora_A, layer.scaling

    return read
