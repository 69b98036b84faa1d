"""Factors as a stock LoRA adapter that anybody loads with PEFT, written layer by layer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...factors import LoraInit, LowRankFactors, Split, SvdGuided
from ...files import write_json
from ...models import PREFIX, WholeModules, loadable_task_type, model_skeleton, whole_modules
from ..dtypes import Dtype, torch_dtype
from ..output_folder import EXPORT_REPORT, OutputFolder
from ..record import KeptLayer
from ..rounding import Factors, stored
from ..stock_lora import LoraShape, lora_config, stock_lora, write_layer
from .plan import ExportPlan, export_plan, target_modules
from .record import ExportedAdapter

logger = logging.getLogger(__name__)

# Bfloat16 changes a delta by about 0.0025 of its norm: beyond this, entries have underflowed.
_COARSE = 0.01


def export_adapter(
    factors: Mapping[str, LowRankFactors],
    ranks: int | Mapping[str, int],
    output_dir: str | os.PathLike,
    *,
    base_model_name_or_path: str | None = None,
    base_model_revision: str | None = None,
    base: str | os.PathLike | nn.Module | None = None,
    split: Split = "output",
    dtype: Dtype = "float32",
    uniform: bool = False,
    modules_to_save: Mapping[str, Tensor] | None = None,
    task_type: str | None = "auto",
) -> ExportedAdapter:
    """Write the truncation of every delta as a LoRA adapter with scaling 1 (alpha = r).

    Layers too small for their rank, and deltas of lower rank, get all they have. A layer without
    any triplet is left out. Each layer is read twice, and one is in memory at a time.

    Args:
        factors: by module name; may read from a disk.
        ranks: triplets kept, one number for all layers or one for each, where 0 leaves one out.
        output_dir: folder of the adapter, see `OutputFolder`: an earlier result is replaced.
        base_model_name_or_path, base_model_revision: stored in the adapter's config.
        base: folder of the base model, or the model on the meta device; with it target modules are
            checked, and listed by their last name part where that selects the same layers, as
            servers expect, else by full name.
        split: "output" or "balanced", see `SvdGuided`. Of the two, "balanced" loses less of the
            range of half precision: its A and B have entries of one size.
        dtype: of A and B.
        uniform: give all layers the largest of the ranks, padded with zeros, so that there is no
            `rank_pattern`, which servers such as vLLM do not read. A layer left out gets zeros
            where its last name part is that of an adapted one.
        modules_to_save: whole tensors by name of the parameter in the base model, embeddings and
            norms say, stored in their own dtype; read one at a time, twice each. Needs `base`.
            See `whole_modules` for tied ones. Servers such as vLLM refuse such adapters.
        task_type: stored in the adapter's config, by which PEFT chooses the class that it wraps the
            model in. "auto" is that of the class of `base`, as `loadable_task_type` says, and
            "CAUSAL_LM" without a base; None suits a model of any class.

    Raises:
        ValueError: if a layer holds fewer triplets than asked for although its delta has more, a
            factor overflows `dtype`, no layer has anything to keep, `ranks`, `modules_to_save`,
            `task_type` and `base` do not fit the factors, or `output_dir` holds other files, then
            or when the adapter is to be put there.
        OSError: if the disk is full; as after any error, what was there before is still there.
    """
    narrow = torch_dtype(dtype)
    output = OutputFolder.checked(output_dir, "output_dir")
    plan = export_plan(factors, ranks, uniform=uniform)
    skeleton = base if base is None or isinstance(base, nn.Module) else model_skeleton(base)
    given = modules_to_save or {}
    whole = _whole_modules(skeleton, given, plan)
    config = lora_config(
        plan.stored,
        target_modules=target_modules(plan, skeleton),
        modules_to_save=whole.names or None,
        ensure_weight_tying=whole.tied,
        base_model_name_or_path=base_model_name_or_path,
        revision=base_model_revision,
        task_type=_task_type(skeleton, task_type, whole),
    )
    beside = {}
    for name, source in whole.source_of.items():
        tensor = _whole_tensor(skeleton, name, given[source])
        beside[PREFIX + name] = tensor.dtype, tuple(tensor.shape)
    shapes = {n: LoraShape(rank, plan.shapes[n], narrow) for n, rank in plan.stored.items()}
    initializer = SvdGuided("delta", split)
    layers = []
    with output.replacing() as temporary:
        with stock_lora(temporary, config, shapes, beside) as writer:
            # disable=None: no bar where standard error is not a terminal.
            for name in tqdm(plan.kept, desc="Writing the adapter", unit="layer", disable=None):
                layer, pair = _kept(name, factors[name], plan, initializer, narrow)
                layers.append(layer)
                if name in plan.stored:
                    write_layer(writer, name, pair)
            for name, source in whole.source_of.items():
                writer.write(PREFIX + name, given[source])
        exported = ExportedAdapter(
            output=output.path,
            layers=tuple(layers),
            parameters=sum(rank * sum(plan.shapes[name]) for name, rank in plan.stored.items()),
            rank=config["r"],
            omitted=plan.omitted,
        )
        write_json(temporary / EXPORT_REPORT, exported.as_dict())
    _warn_of_coarse_rounding(layers, dtype)
    return exported


def _kept(
    name: str, layer: LowRankFactors, plan: ExportPlan, initializer: SvdGuided, dtype: torch.dtype
) -> tuple[KeptLayer, Factors]:
    rank, (rows, columns) = plan.kept[name], plan.shapes[name]
    init, lost = LoraInit(torch.zeros(0, columns), torch.zeros(rows, 0), False), layer.norm
    if rank:
        init = initializer(layer, rank=rank, scaling=1.0)
        lost = layer.relative_error(rank) * layer.norm
    pair, rounding = stored(name, init, dtype, plan.stored.get(name))
    kept = KeptLayer(name, (rows, columns), layer.rank, rank, layer.norm, lost, rounding)
    return kept, pair


def _whole_modules(
    skeleton: nn.Module | None, given: Mapping[str, Tensor], plan: ExportPlan
) -> WholeModules:
    if not given:
        return WholeModules([], {})
    if skeleton is None:
        raise ValueError("modules_to_save needs base, against which its names are checked")
    return whole_modules(skeleton, list(given), plan.stored)


def _task_type(
    skeleton: nn.Module | None, task_type: str | None, whole: WholeModules
) -> str | None:
    if skeleton is None:
        return "CAUSAL_LM" if task_type == "auto" else task_type
    return loadable_task_type(skeleton, task_type, whole.names)


def _whole_tensor(skeleton: nn.Module | None, name: str, tensor: Tensor) -> Tensor:
    expected = tuple(skeleton.get_parameter(name).shape) if skeleton is not None else None
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"modules_to_save: {name} has shape {tuple(tensor.shape)}, the base's has {expected}; "
            "was the vocabulary changed?"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"modules_to_save: {name} has NaN or infinite entries")
    return tensor


def _warn_of_coarse_rounding(layers: Sequence[KeptLayer], dtype: Dtype) -> None:
    changes = {layer.name: layer.relative(layer.rounding_error) for layer in layers}
    coarse = [name for name, change in changes.items() if change > _COARSE]
    if coarse:
        worst = max(coarse, key=lambda name: changes[name])
        logger.warning(
            "Rounding to %s changes %d layers by more than %g of their delta, %s by %.2g: entries "
            'are below its range. Use a wider dtype, or split="balanced"',
            dtype,
            len(coarse),
            _COARSE,
            worst,
            changes[worst],
        )
