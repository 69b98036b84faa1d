"""The stages of LoRI, as functions of the folder they work in: calibrate, choose a mask, train."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from peft_svdinit import FactorsFile, LoriConfig
from peft_svdinit.masks import (
    MASK_FILE_NAME,
    SCORES_FILE_NAME,
    LayerScores,
    LoriMask,
    load_mask,
    random_projection,
    save_mask,
    teacher_scores,
)
from peft_svdinit.models import LinearModule, linear_modules, model_skeleton
from peft_svdinit.training import (
    ModelOptions,
    RecipeArguments,
    Run,
    Unfinished,
    load_model,
    resolve_model,
)
from peft_svdinit.tuner import gradient_scores
from stages.fit import Materials, check_complete, fit
from stages.lori_options import LoriOptions, SparseOptions
from trainer_callbacks.lori_calibration import LoriCalibrationCallback


def target_layers(model: ModelOptions, sparse: SparseOptions) -> dict[str, LinearModule]:
    """The layers that will be adapted, found without loading weights."""
    return linear_modules(_skeleton(model), sparse.target_modules)


def check_selection(
    layers: Mapping[str, LinearModule],
    sparse: SparseOptions,
    seed: int,
    exclude: Sequence[LoriMask] = (),
) -> LoriMask:
    """Choose a random mask, so that a budget that cannot be kept is known before any training.

    Raises:
        ValueError: naming the option.
    """
    selection = replace(sparse.selection, exclude=exclude)
    return _random_layers(layers, sparse.lora_r, seed).mask(selection)


def check_adapter(model: ModelOptions, config: LoriConfig) -> None:
    """Make the adapter on a base without weights, so that what does not fit is known early.

    Raises:
        ValueError, TypeError, OSError: as the adapter of the training would.
    """
    get_peft_model(_skeleton(model), config, low_cpu_mem_usage=True)


def _skeleton(model: ModelOptions) -> Any:
    return model_skeleton(resolve_model(model.model_name_or_path), "model_name_or_path")


def calibration_arguments(
    arguments: RecipeArguments, sparse: SparseOptions, rate: float | None = None
) -> RecipeArguments:
    """How the calibration trains: as the sparse run but for steps and rate, never evaluated.

    Args:
        rate: learning rate of the sparse run, by default that of `arguments`.
    """
    rate = arguments.learning_rate if rate is None else rate
    chosen = sparse.calibration_learning_rate
    return replace(
        arguments,
        max_steps=sparse.calibration_steps or arguments.max_steps,
        learning_rate=rate / 3 if chosen is None else chosen,
        eval_strategy="no",
        eval_steps=None,
        eval_on_start=False,
        load_best_model_at_end=False,
        push_to_hub=False,
        # A new one has its sums of gradients only after the Trainer has deleted an older one.
        save_total_limit=2 if arguments.save_total_limit == 1 else arguments.save_total_limit,
    )


def calibrate(
    folder: Path,
    *,
    materials: Materials,
    model: ModelOptions,
    config: LoriConfig,
    arguments: RecipeArguments,
    score: str = "magnitude",
) -> None:
    """Train a dense B over the frozen A; its folder then has the scores of all entries.

    Raises:
        Unfinished: if the scores could not be written.
    """
    arguments = replace(arguments, output_dir=str(folder), resume_from_checkpoint="last")
    callback = LoriCalibrationCallback(density=None, score=score)
    fit(lori_model(model, config), materials, arguments, callbacks=[callback], quiet=True)
    check_complete(folder, SCORES_FILE_NAME)
    remove_checkpoints(arguments)


def choose_mask(
    folder: Path,
    *,
    scores: Callable[[], LayerScores],
    sparse: SparseOptions,
    exclude: Sequence[str],
) -> None:
    """Write the mask of the highest scores to `folder`."""
    excluded = [load_mask(path, argument="exclude_masks") for path in exclude]
    save_mask(folder, scores().mask(replace(sparse.selection, exclude=excluded)))


def uncalibrated_scores(
    lori: LoriOptions,
    layers: Mapping[str, LinearModule],
    materials: Materials,
    model: ModelOptions,
    arguments: RecipeArguments,
) -> LayerScores:
    """The scores of a mask source that needs no calibration run."""
    drawn = _random_layers(layers, lori.lora_r, lori.lori_seed)
    if lori.mask_source == "random":
        return drawn
    if lori.mask_source == "teacher":
        projections = {
            name: random_projection(name, lori.lora_r, layer.in_features, lori.lori_seed)
            for name, layer in layers.items()
        }
        scores = teacher_scores(
            FactorsFile(str(lori.svd_factors), argument="svd_factors"), projections
        )
        return replace(drawn, scores=scores, source={"kind": "teacher"})
    size = arguments.train_batch_size
    part = materials.part(arguments.seed, 0, lori.init_batches * size)
    dense = lori_model(model, lori.config(seed=lori.lori_seed, start=lori.lori_start))
    if not getattr(dense, "is_quantized", False):
        dense.to(arguments.device)
    scores = gradient_scores(dense, islice(part.batches(size), lori.init_batches))
    return replace(drawn, scores=scores, source={"kind": "gradient", "batches": lori.init_batches})


def train_sparse(
    materials: Materials,
    model: ModelOptions,
    config: LoriConfig,
    arguments: RecipeArguments,
    *,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run | None:
    """Train the entries of a mask, which all processes must have read alike.

    Raises:
        Unfinished: if processes read different masks.
    """
    check_agreement(Path(config.lori_mask))
    return fit(lori_model(model, config), materials, arguments, extra=extra, quiet=quiet)


def check_agreement(folder: Path) -> None:
    """Raise Unfinished unless all processes find the same mask in `folder`."""
    content = (folder / MASK_FILE_NAME).read_bytes()
    found = gather_object([hashlib.sha256(content).hexdigest()])
    if len(set(found)) > 1:
        raise Unfinished(
            f"{folder} holds different masks on different machines; put output_dir on a file "
            "system that they share"
        )


def lori_model(model: ModelOptions, config: LoriConfig) -> PeftModel:
    """The base model with its LoRI adapter, in which nothing is random but A's seed."""
    return get_peft_model(prepared_base(model), config)  # pyright: ignore[reportReturnType]


def prepared_base(model: ModelOptions) -> Any:
    """The base model; a quantised one is prepared for training."""
    base: Any = load_model(model)
    return prepare_model_for_kbit_training(base) if getattr(base, "is_quantized", False) else base


def remove_checkpoints(arguments: RecipeArguments) -> None:
    """Remove the checkpoints of a run that has ended, on the main process."""
    if arguments.process_index == 0:
        for checkpoint in Path(str(arguments.output_dir)).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _random_layers(layers: Mapping[str, LinearModule], rank: int, seed: int) -> LayerScores:
    shapes = {name: (layer.out_features, rank) for name, layer in layers.items()}
    in_features = {name: layer.in_features for name, layer in layers.items()}
    return LayerScores.random(shapes, in_features, seed)
