"""A pair of checkpoints as a LoRA adapter: streamed, resumable, verified before it is published."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...factors import (
    CheckpointPair,
    Factorisation,
    LayerStore,
    LowRankFactors,
    RankRule,
    Spectrum,
    Split,
    fill_store,
)
from ...files import file_stamps, write_json, write_text
from ...models import whole_modules
from ..checking.layers import Verification, verify_adapter
from ..checking.sample_text import SAMPLE_TEXTS
from ..checking.text import can_compare, compare_on_text
from ..export.record import ExportedAdapter
from ..export.write import export_adapter
from ..output_folder import EXTRACTION_JSON, EXTRACTION_REPORT, OutputFolder
from .record import ExtractedAdapter

logger = logging.getLogger(__name__)

Verify = Literal["full", "layers", "none"]


@dataclass(frozen=True)
class AdapterForm:
    """What the written adapter is like; the fields are those of `export_adapter`.

    Attributes:
        modules_to_save: modules outside the linear layers that the adapter replaces as a whole, by
            names or endings, or "changed" for all that fine-tuning changed.
        verify: "full" loads the adapter through stock PEFT, compares every layer with its delta
            and runs base, tuned and base + adapter on a little text; "layers" does without the
            text, for models that do not fit in memory; "none" trusts.
        texts: what "full" reads.
    """

    uniform: bool = False
    split: Split = "output"
    dtype: torch.dtype = torch.float32
    modules_to_save: Sequence[str] = ()
    verify: Verify = "full"
    texts: Sequence[str] = field(default=SAMPLE_TEXTS, repr=False)

    def __post_init__(self) -> None:
        if self.verify not in get_args(Verify):
            raise ValueError(
                f"verify must be one of {', '.join(get_args(Verify))}, got {self.verify!r}"
            )


def extract_adapter(
    pair: CheckpointPair,
    output_dir: str | os.PathLike,
    rule: RankRule,
    form: AdapterForm | None = None,
    *,
    base_model_name_or_path: str,
    base_model_revision: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    read_ahead: int = 1,
) -> ExtractedAdapter:
    """Write the low-rank part of tuned − base as a stock LoRA adapter.

    Layer after layer goes to `<output_dir>.partial`; a run that was killed goes on there, if it
    has the same inputs. The adapter is written and verified in that folder too, and becomes
    `output_dir` only then: there is never a wrong or a half adapter. One delta is in memory beside
    those read ahead, whatever the number of layers.

    Args:
        pair: the checkpoints.
        output_dir: of adapter and report, see `OutputFolder`: one with an adapter is replaced.
        rule: the ranks, with an upper bound.
        form: dtype, uniform rank and so on, and how to verify.
        base_model_name_or_path, base_model_revision: stored in the adapter's config.
        seed: of the randomised SVD.
        device: where it runs.
        read_ahead: deltas read while one is factorised.

    Raises:
        ValueError: if the checkpoints are equal in every layer, `output_dir` holds other files or
            is being written by another process, a check fails, or as the parts raise.
        OSError: if the disk is full; the same call then goes on where it stopped.
    """
    form = form or AdapterForm()
    output = OutputFolder.checked(output_dir, "output_dir")
    target = output.path.resolve()
    factorise = factorisation(rule, seed=seed, device=device)
    whole = _whole(pair, form)
    readable = _readable(pair, form)
    if pair.changed_settings:
        logger.warning(
            "The configurations differ in what no adapter can carry: %s",
            ", ".join(f"{k}: {a} > {b}" for k, (a, b) in pair.changed_settings.items()),
        )
    with factorised(pair, target, factorise, read_ahead=read_ahead) as (store, unchanged):
        ranks, short = rule.choose(stored_spectra(store, pair), uniform=form.uniform)
        if short:
            logger.warning(
                "%d layers, %s the first, do not reach the bound with rank %d; raise max_rank",
                len(short),
                short[0],
                rule.most,
            )
        written = store.result
        shutil.rmtree(written, ignore_errors=True)  # What a killed run left.
        base = pair.base.checkpoint.folder
        exported = export_adapter(
            store,
            ranks,
            written,
            base_model_name_or_path=base_model_name_or_path,
            base_model_revision=base_model_revision,
            base=base,
            split=form.split,
            dtype=form.dtype,
            uniform=form.uniform,
            modules_to_save=whole,
        )
        verification = _verified(written, pair, exported, whole, form)
        text = compare_on_text(*_folders(pair), written, form.texts) if readable else None
        missed = [tensor for tensor in pair.uncovered() if tensor.key not in whole]
        extracted = ExtractedAdapter(
            target,
            _settings(pair, rule, form, seed, base_model_name_or_path),
            replace(exported, folder=target),
            short,
            missed,
            verification,
            text,
        )
        write_json(written / EXTRACTION_JSON, extracted.as_dict())
        write_text(written / EXTRACTION_REPORT, extracted.as_text())
        unchanged()
        with output.replacing() as temporary:
            os.replace(written, temporary)
    return extracted


@contextmanager
def factorised(
    pair: CheckpointPair,
    target: Path,
    factorise: Callable[[str, Tensor], LowRankFactors],
    *,
    read_ahead: int = 1,
) -> Iterator[tuple[LayerStore, Callable[[], None]]]:
    """The factors of every layer in the working folder of `target`, which goes when all is done.

    Yields the store, and a check to call before anything is published: it raises ValueError if the
    checkpoints' files are not those that were read. After an error the store stays for a resume.

    Raises:
        ValueError: if tensors changed that no layer covers, or as `LayerStore` and `fill_store` do.
    """
    refuse_unknown_parts(pair)
    stamps = pair_stamps(pair)

    def unchanged() -> None:
        if pair_stamps(pair) != stamps:
            raise ValueError("base or tuned changed while they were read; run the extraction again")

    inputs = {"factorisation": repr(factorise), "pair": stamps}
    working = target.with_name(f"{target.name}.partial")
    with LayerStore(working, list(pair), inputs) as store:
        fill_store(store, pair, factorise, read_ahead=read_ahead)
        yield store, unchanged
        store.remove()


def _whole(pair: CheckpointPair, form: AdapterForm) -> Mapping[str, Tensor]:
    """The tensors that go along whole, checked before any work."""
    if not form.modules_to_save:
        return {}
    whole = pair.whole_tensors(list(form.modules_to_save))
    whole_modules(pair.base.skeleton, list(whole), list(pair))
    return whole


def refuse_unknown_parts(pair: CheckpointPair) -> None:
    """Raise ValueError if tensors changed that the loaded model spells in another way.

    An adapter of the linear layers alone would then lack what may be most of the model, as where
    experts are stored one by one and loaded as one tensor.
    """
    unknown = [tensor.key for tensor in pair.uncovered() if not pair.is_parameter(tensor.key)]
    if unknown:
        raise ValueError(
            f"tuned: {len(unknown)} changed tensors, {unknown[0]} the first, are no parameters of "
            f"{type(pair.base.skeleton).__name__} by these names (experts stored one by one?), and "
            "no adapter of its linear layers covers them; exclude_modules can leave them out"
        )


def _settings(
    pair: CheckpointPair, rule: RankRule, form: AdapterForm, seed: int, base: str
) -> dict[str, Any]:
    return {
        "base": base,
        "tuned": str(pair.tuned.checkpoint.folder),
        "ranks": {name: value for name, value in asdict(rule).items() if value is not None},
        "uniform": form.uniform,
        "split": form.split,
        "dtype": str(form.dtype).removeprefix("torch."),
        "modules_to_save": list(form.modules_to_save),
        "verify": form.verify,
        "seed": seed,
        "changed_settings": pair.changed_settings,
    }


def _verified(
    folder: Path,
    pair: CheckpointPair,
    exported: ExportedAdapter,
    whole: Mapping[str, Tensor],
    form: AdapterForm,
) -> Verification | None:
    if form.verify == "none":
        return None
    base = pair.base.checkpoint.folder
    return verify_adapter(folder, base, pair, exported.errors, modules_to_save=whole)


def _readable(pair: CheckpointPair, form: AdapterForm) -> bool:
    """Whether the models will be run on text; decided and said before any work."""
    if form.verify != "full":
        return False
    reason = "they predict different vocabularies" if pair.sliced else can_compare(*_folders(pair))
    if reason:
        logger.warning("base and tuned are not run on text: %s", reason)
    return reason is None


def _folders(pair: CheckpointPair) -> tuple[Path, Path]:
    return pair.base.checkpoint.folder, pair.tuned.checkpoint.folder


def factorisation(rule: RankRule, *, seed: int = 0, device: str = "cpu") -> Factorisation:
    """How to factorise every layer so that the rule can choose among its triplets.

    Raises:
        ValueError: if the rule has no bound of the rank.
    """
    if rule.most is None:
        raise ValueError("max_rank is needed with energy, error or max_parameters, got None")
    return Factorisation(rule.most, energy=rule.energy, error=rule.error, seed=seed, device=device)


def stored_spectra(store: LayerStore, pair: CheckpointPair) -> dict[str, Spectrum]:
    """Singular values, norm and shape of every layer; the vectors stay on the disk.

    Raises:
        ValueError: if every delta is zero.
    """
    spectra = {}
    for name in store:
        S, norm = store.singular_values(name)
        module = pair.base.modules[name]
        spectra[name] = Spectrum(S, norm, (module.out_features, module.in_features))
    if not any(layer.norm for layer in spectra.values()):
        raise ValueError("tuned: its linear layers all equal the base's; there is no delta")
    return spectra


def pair_stamps(pair: CheckpointPair) -> list[Any]:
    """By what a change of the two checkpoints is noticed."""
    files = [file for side in (pair.base, pair.tuned) for file in side.checkpoint.files]
    return [[str(file.resolve()), file_stamps(file)] for file in files]
