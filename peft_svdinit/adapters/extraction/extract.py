"""A pair of checkpoints as a LoRA adapter: streamed, resumable, verified before it is published."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ...factors import CheckpointPair, RankRule, Split, WholeTensors, rounding_share
from ...files import write_json, write_text
from ...models import refuse_unloadable_layers, whole_modules
from ..checking.layers import Verification, verify_adapter
from ..checking.sample_text import SAMPLE_TEXTS
from ..checking.text import can_compare, compare_on_text
from ..dtypes import Dtype, torch_dtype
from ..export.record import ExportedAdapter
from ..export.write import export_adapter
from ..output_folder import EXPORT_REPORT, EXTRACTION_JSON, EXTRACTION_REPORT, OutputFolder
from .record import ExtractedAdapter
from .store import factorisation, factorised, stored_spectra

logger = logging.getLogger(__name__)

Verify = Literal["full", "layers", "none"]


@dataclass(frozen=True)
class AdapterForm:
    """What the written adapter is like, beside its ranks; the fields as of `export_adapter`.

    Attributes:
        modules_to_save: modules outside the linear layers that the adapter replaces as a whole, by
            names or endings, or "changed" for all that fine-tuning changed.
        verify: "full" loads the adapter through stock PEFT, compares every layer with its delta
            and runs base, tuned and base + adapter on a little text; "layers" does without the
            text, for models that do not fit in memory; "none" trusts.
        texts: what "full" reads.
    """

    split: Split = "output"
    dtype: Dtype = "float32"
    modules_to_save: Sequence[str] = ()
    verify: Verify = "full"
    texts: Sequence[str] = field(default=SAMPLE_TEXTS, repr=False)

    def __post_init__(self) -> None:
        if self.verify not in get_args(Verify):
            raise ValueError(
                f"verify must be one of {', '.join(get_args(Verify))}, got {self.verify!r}"
            )
        torch_dtype(self.dtype)  # Which refuses a wrong one.


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
        output_dir: of adapter and report, see `OutputFolder`: an earlier result is replaced.
        rule: the ranks, with an upper bound.
        form: dtype and so on, and how to verify.
        base_model_name_or_path, base_model_revision: stored in the adapter's config.
        seed: of the randomised SVD.
        device: where it runs.
        read_ahead: deltas read while one is factorised.

    Raises:
        ValueError: if the checkpoints are equal in every layer, PEFT takes the name of one for
            another's, as in mixtures of experts it does those of shared experts, `output_dir` holds
            other files or is being written by another process, a check fails, or as the parts
            raise.
        OSError: if the disk is full; the same call then goes on where it stopped.
    """
    form = form or AdapterForm()
    output = OutputFolder.checked(output_dir, "output_dir")
    target = output.path.resolve()
    factorise = factorisation(rule, seed=seed, device=device)
    check_targets(pair)
    whole = whole_of(pair, form)
    readable = _readable(pair, form)
    if pair.changed_settings:
        logger.warning(
            "The configurations differ in what no adapter can carry: %s",
            ", ".join(f"{k}: {a} > {b}" for k, (a, b) in pair.changed_settings.items()),
        )
    with factorised(pair, target, factorise, read_ahead=read_ahead) as (store, unchanged):
        ranks, short = rule.choose(stored_spectra(store, pair))
        if short:
            logger.warning(
                "%d layers, %s the first, do not reach the bound with rank %d; raise max_rank",
                len(short),
                short[0],
                rule.most,
            )
        written = store.result
        shutil.rmtree(written, ignore_errors=True)  # What a killed run left.
        exported = export_adapter(
            store,
            ranks,
            written,
            base_model_name_or_path=base_model_name_or_path,
            base_model_revision=base_model_revision,
            base=pair.base.parameters.model,
            split=form.split,
            dtype=form.dtype,
            uniform=rule.uniform,
            modules_to_save=whole,
        )
        verification = _verified(written, pair, exported, whole, form)
        text = compare_on_text(*_folders(pair), written, form.texts) if readable else None
        missed = [tensor for tensor in pair.uncovered() if tensor.key not in whole]
        extracted = ExtractedAdapter(
            target,
            _settings(pair, rule, form, seed, base_model_name_or_path),
            replace(exported, output=target),
            short,
            sorted({name.rpartition(".")[0] for name in whole}),
            missed,
            verification,
            text,
            rounded=[name for name in exported.zero_layers if pair.is_rounding(name)],
            rounded_tensors=pair.rounded_tensors,
            rounding_share=rounding_share(pair, {x.name: x.norm for x in exported.layers}),
        )
        (written / EXPORT_REPORT).unlink()  # What follows says more.
        write_json(written / EXTRACTION_JSON, extracted.as_dict())
        write_text(written / EXTRACTION_REPORT, extracted.as_text())
        unchanged()
        with output.replacing() as temporary:
            for file in written.iterdir():
                shutil.move(file, temporary / file.name)
    return extracted


def check_targets(pair: CheckpointPair) -> None:
    """Raise ValueError if a layer of the pair cannot be in an adapter that stock PEFT loads."""
    model = pair.base.parameters.model
    refuse_unloadable_layers(model, list(pair), "leave them out: --exclude_modules")


def whole_of(pair: CheckpointPair, form: AdapterForm) -> WholeTensors:
    """The tensors that go along whole: the pair's heads, and what the form says.

    Raises:
        ValueError: if PEFT cannot store them.
    """
    whole = pair.whole_tensors(list(form.modules_to_save))
    whole_modules(pair.base.parameters.model, list(whole), list(pair))
    return whole


def _settings(
    pair: CheckpointPair, rule: RankRule, form: AdapterForm, seed: int, base: str
) -> dict[str, Any]:
    ranks = {name: value for name, value in asdict(rule).items() if value is not None}
    return {
        "base": base,
        "tuned": str(pair.tuned.checkpoint.folder),
        "uniform": ranks.pop("uniform"),
        "ranks": ranks,
        "split": form.split,
        "dtype": form.dtype,
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
    return verify_adapter(folder, pair.skeleton(), pair, exported.errors, modules_to_save=whole)


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
