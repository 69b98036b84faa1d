"""Train a LoRI adapter: calibrate, choose a mask, train its entries alone, evaluate.

    accelerate launch recipes/train_lori.py --output_dir runs/lori
    accelerate launch recipes/train_lori.py --mask_source gradient --output_dir runs/gradient
    accelerate launch recipes/train_lori.py --lori_start runs/lori --exclude_masks runs/lori \\
        --dataset_name builtin:python-topics --output_dir runs/second

The same command again goes on where a killed one was; after a change of options, the stages that
they concern run again. The folder then holds a stock adapter, which any PEFT loads, with its mask
and `svdinit_config.json`, the compact `lori_adapter.safetensors`, and the run's record.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from stages.fit import Materials, check_complete, outcome
from stages.lori_options import SOURCES, LoriArguments, LoriOptions
from stages.lori_stages import (
    calibration_arguments,
    check_adapter,
    check_selection,
    target_layers,
    train_sparse,
    uncalibrated_scores,
)
from stages.lori_tasks import calibration_task, mask_task, run_inputs
from stages.processes import leave_process_group
from stages.pushing import prepare_push
from stages.resuming import check_checkpoint

from peft_svdinit import FactorsFile
from peft_svdinit.adapters import compact_adapter_folder
from peft_svdinit.files import file_stamps, read_json, write_json
from peft_svdinit.masks import COMPACT_FILE_NAME, MASK_FILE_NAME, LoriMask, load_mask, save_mask
from peft_svdinit.models import LinearModule
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    Task,
    parse_options,
    refusals_in_one_line,
    run_tasks,
)

RECORD = "lori_training.json"


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, LoriOptions, LoriArguments)
    model, data, lori, arguments = parse_options(
        classes, argv, description=__doc__ or "", script=__file__
    )
    state = PartialState()
    with refusals_in_one_line((model, data, lori, arguments)):
        check_checkpoint(arguments)
        with state.main_process_first():
            layers = check_inputs(model, lori, arguments)
            materials = Materials.prepare(model, data)
        push = prepare_push(arguments, model)
        *stages, training = make_tasks(model, data, lori, arguments, layers, materials)
        run_tasks(
            stages,
            ("calibrate", "mask"),
            report=print if state.is_main_process else (lambda line: None),
            is_main=state.is_main_process,
            barrier=state.wait_for_everyone,
        )
        if state.is_main_process:
            prepare_folder(training, arguments)
        state.wait_for_everyone()
        folder = stages[-1].folder
        mask = load_mask(folder)
        run = train_sparse(
            materials,
            model,
            lori.config(seed=lori.lori_seed, mask=str(folder), start=lori.lori_start),
            arguments,
            extra={"lori": {"source": dict(mask.source), "trained": mask.kept, "of": mask.size}},
        )
        if run is not None:
            compact = compact_adapter_folder(run.directory, run.directory)
            stock = run.directory / SAFETENSORS_WEIGHTS_NAME
            print(f"{outcome(run)}; {share(mask)}")
            print(f"{_size(stock)} of stock adapter, {_size(compact)} compact, in {run.directory}")
        check_complete(Path(str(arguments.output_dir)))
        push(str(arguments.output_dir))


def check_inputs(
    model: ModelOptions, lori: LoriOptions, arguments: LoriArguments
) -> dict[str, LinearModule]:
    """The layers to adapt; refuse what would fail later, before anything is trained.

    Raises:
        ValueError, TypeError, OSError: naming the option.
    """
    output = Path(str(arguments.output_dir))
    found = [path.name for path in _of_a_training(output)]
    if found and not (output / RECORD).is_file():
        raise ValueError(
            f"output_dir: {output} has {min(found)} of another recipe, which would be deleted; "
            "choose another folder"
        )
    for option, read in (
        ("lori_start", [lori.lori_start] if lori.lori_start else []),
        ("mask_source", [lori.mask_source] if lori.given else []),
        ("exclude_masks", lori.exclude_masks),
    ):
        for path in read:
            if _is_replaced(path, output):
                raise ValueError(
                    f"{option}: {path} is in output_dir {output}, where the training replaces it; "
                    "choose another output_dir"
                )
    layers = target_layers(model, lori)
    if lori.given:
        if not Path(lori.mask_source).expanduser().exists():
            raise ValueError(
                f"mask_source must be one of {', '.join(SOURCES)}, or the path of a mask; got "
                f"{lori.mask_source!r}"
            )
        mask = load_mask(lori.mask_source, argument="mask_source")
        if (mask.density, mask.seed) != (lori.lori_density, lori.lori_seed):
            raise ValueError(
                f"mask_source: {lori.mask_source} is of density {mask.density} for the A of seed "
                f"{mask.seed}; set lori_density={mask.density} and lori_seed={mask.seed}"
            )
    else:
        excluded = [load_mask(path, argument="exclude_masks") for path in lori.exclude_masks]
        check_selection(layers, lori, lori.lori_seed, excluded)
    if lori.given or lori.lori_start:
        path = lori.mask_source if lori.given else None
        check_adapter(model, lori.config(seed=lori.lori_seed, mask=path, start=lori.lori_start))
    if lori.svd_factors:
        FactorsFile(lori.svd_factors, argument="svd_factors")
    return layers


def make_tasks(
    model: ModelOptions,
    data: DataOptions,
    lori: LoriOptions,
    arguments: LoriArguments,
    layers: Mapping[str, LinearModule],
    materials: Materials,
) -> list[Task]:
    """The stages in their order; the last one, the training, takes place in `output_dir` itself."""
    root = Path(str(arguments.output_dir))
    start = {"start": _stamps(lori.lori_start), "lori_seed": lori.lori_seed}
    if lori.calibrates:
        first = calibration_arguments(arguments, lori)
        calibration = calibration_task(
            "calibration",
            root=root,
            inputs={**run_inputs(model, data, first), **start},
            materials=lambda: materials,
            model=model,
            sparse=lori,
            seed=lori.lori_seed,
            arguments=first,
            score=lori.mask_source,
            start=lori.lori_start,
        )
        before, scores = [calibration], calibration
    else:
        before = []
        scores = partial(uncalibrated_scores, lori, layers, materials, model, arguments)
    inputs = run_inputs(model, data, arguments)
    about: dict[str, Any] = {**start, "adapter": lori.adapter, "source": lori.mask_source}
    if lori.given:
        about["mask"] = _stamps(lori.mask_source)
        mask = Task("mask", "mask", about, partial(_copy_mask, lori.mask_source), root=root)
    else:
        about["exclude"] = [_stamps(path) for path in lori.exclude_masks]
        if lori.mask_source == "teacher":
            about["factors"] = _stamps(lori.svd_factors)
        if lori.mask_source == "gradient":
            about |= {"run": inputs, "batches": lori.init_batches}
        mask = mask_task(
            "mask", root=root, sparse=lori, scores=scores, exclude=lori.exclude_masks, inputs=about
        )
    training = Task(
        "train", "training", {**inputs, **start}, lambda folder: None, after=[mask], root=root
    )
    return [*before, mask, training]


def prepare_folder(training: Task, arguments: LoriArguments) -> None:
    """Remove what a training of other options left in the folder, and note which one begins."""
    folder, resume = training.root, arguments.resume_from_checkpoint
    record = folder / RECORD
    known = read_json(record, "output_dir") if record.is_file() else {}
    if resume and known.get("digest") == training.digest:
        return
    if resume in (None, "last"):
        for path in _of_a_training(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    write_json(record, {"digest": training.digest, "inputs": dict(training.inputs)})


def _of_a_training(folder: Path) -> list[Path]:
    """The checkpoints and the files of the adapter that are in a folder."""
    names = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, MASK_FILE_NAME, COMPACT_FILE_NAME)
    files = [folder / name for name in names if (folder / name).is_file()]
    return [*folder.glob("checkpoint-*"), *files]


def share(mask: LoriMask) -> str:
    """What of the adapter is trained, in words."""
    lora = mask.size + sum(layer.rank * layer.in_features for layer in mask.layers.values())
    return (
        f"{mask.kept:,} values trained, {mask.kept / mask.size:.1%} of B and "
        f"{mask.kept / lora:.1%} of a LoRA of this rank"
    )


def _is_replaced(path: str, output: Path) -> bool:
    """Whether `path` is the adapter that a training leaves in `output`, or a part of it."""
    found, folder = Path(path).expanduser().resolve(), output.expanduser().resolve()
    inside = found.parent == folder
    return found == folder or (inside and (found.is_file() or found.name.startswith("checkpoint-")))


def _copy_mask(source: str, folder: Path) -> None:
    save_mask(folder, load_mask(source))


def _stamps(path: str | None) -> Any:
    return path and (file_stamps(path) or path)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
    leave_process_group()
