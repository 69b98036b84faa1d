"""An adapter or a fine-tuned model as the start: its factors in the run's folder, its moments."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_svdinit import FactorsFile, warm_start
from peft_svdinit.factors import FACTORS_FILE_NAME, Held, LoraAdapter
from peft_svdinit.files import WrongKind, file_stamps, is_local, resolve_folder
from peft_svdinit.optim import lora_parameters, moments_beside
from peft_svdinit.training import ModelOptions, RecipeArguments, resolve_model
from stages.data_start import FOLDER
from stages.lora_options import LoraOptions
from stages.resuming import checkpoint_to_resume
from trainer_callbacks import CarryMomentsCallback
from trainer_callbacks.plain_optimizer import plain

# What is read of a source. A run's folder has files beside these, which change without it.
_READ = ("adapter_config.json", "adapter_model.safetensors", "config.json", FACTORS_FILE_NAME)


def started_from_source(
    model: ModelOptions, lora: LoraOptions, arguments: RecipeArguments
) -> tuple[LoraOptions, dict[str, Any]]:
    """The options of a start at the delta of `init_from`, and what is worth noting of it.

    The factors are made once, by one process; the others and a resumed run find the file.

    A run that is resumed goes on from its factors where the source is gone; it is compared with
    what the run began at where it can be read.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `warm_start`, if the run to resume began at
            something else, or if the run would overwrite its source.
    """
    source = str(lora.init_from)
    folder = Path(str(arguments.output_dir)) / FOLDER
    _check_apart(source, folder)
    goes_on = checkpoint_to_resume(arguments) is not None
    with arguments.main_process_first(local=False, desc="factors of init_from"):
        known = FactorsFile(folder).metadata.source if _is_made(folder) else {}
        resumed = bool(known) and goes_on
        wanted = {
            "kind": "init_from",
            "files": _stamps_or_known(source, known, arguments) if resumed else _stamps(source),
            "model": [model.model_name_or_path, model.model_revision],
            "seed": arguments.seed,
            **lora.start_options,
        }
        if known.get("options") == wanted:
            about = known["about"]
        elif resumed:
            targets = known.get("about", {}).get("target_modules")
            layers = f" --lora_target_modules {' '.join(targets)}" if targets else ""
            raise ValueError(
                f"init_from: the run in {arguments.output_dir} began at something else: {source} "
                "or an option of its start has changed since. Go on from where it began with "
                f"--init svd --svd_factors {folder}{layers} in place of init_from, or choose "
                "another output_dir"
            )
        else:
            about = _make(folder, wanted, model, lora, arguments)
    targets = about.pop("target_modules")
    if arguments.process_index == 0:
        held = Held(*(about[name] for name in ("rank", "energy", "worst_layer", "worst_energy")))
        print(f"start: the delta of {source} {held}")
    svd = replace(
        lora, init_from=None, init="svd", svd_factors=str(folder), lora_target_modules=targets
    )
    return svd, {"source": "init_from", "init_from": source, **about}


def _make(
    folder: Path,
    wanted: dict[str, Any],
    model: ModelOptions,
    lora: LoraOptions,
    arguments: RecipeArguments,
) -> dict[str, Any]:
    base = resolve_model(model.model_name_or_path)
    began = time.perf_counter()
    start = warm_start(
        str(lora.init_from),
        base=base,
        rank=lora.lora_r,
        target_modules=lora.target_modules if lora.lora_target_modules else None,
        check_base=lora.check_base,
        seed=arguments.seed,
        base_revision=None if is_local(base) else model.model_revision,
        base_name=model.model_name_or_path,
        arguments=("init_from", "model_name_or_path"),
    )
    about = {
        "kind": start.kind,
        "layers": len(start.factors),
        **asdict(start.held),
        "seconds": round(time.perf_counter() - began, 3),
        "target_modules": start.target_modules,
    }
    digests = _digests(str(lora.init_from), wanted["files"])
    start.save(folder, {"options": wanted, "about": about, "digests": digests})
    return about


def _is_made(folder: Path) -> bool:
    return (folder / FACTORS_FILE_NAME).is_file()


def _stamps(source: str) -> dict[str, list[int]]:
    """Of the files that a source is read from, by which a change of them is noticed."""
    if Path(source).expanduser().is_file():
        return file_stamps(source) or {}
    stamps = file_stamps(resolve_folder(source, argument="init_from")) or {}
    return {name: one for name, one in stamps.items() if name in _READ or name.startswith("model")}


def _stamps_or_known(
    source: str, known: dict[str, Any], arguments: RecipeArguments
) -> dict[str, list[int]]:
    """The stamps of a run to resume where its source is gone or has the same bytes, or else new."""
    stored = known.get("options", {}).get("files", {})
    try:
        found = _stamps(source)
    except OSError:
        found = {}
    if stored.keys() - found.keys():
        if arguments.process_index == 0:
            print(f"start: {source} cannot be read any more; the run goes on from its own factors")
        return stored
    if found != stored and found.keys() == stored.keys():
        same = known.get("digests") == _digests(source, found)
        return stored if same else found
    return found


def _digests(source: str, names: dict[str, list[int]]) -> dict[str, str]:
    """Of the bytes of the files, which a copy of them leaves as they are."""
    path = Path(source).expanduser()
    folder = None if path.is_file() else resolve_folder(source, argument="init_from")
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with (folder / name if folder else path).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found


def _check_apart(source: str, start: Path) -> None:
    path = Path(source).expanduser()
    folder = (path.parent if path.is_file() else path).resolve()
    if path.exists() and folder in (start.resolve(), start.parent.resolve()):
        raise ValueError(
            f"init_from={source} lies in output_dir={start.parent}, and the run would overwrite "
            "it; choose another output_dir"
        )


def moments_of_source(
    source: str, model: nn.Module, arguments: RecipeArguments
) -> list[CarryMomentsCallback]:
    """What carries over the Adam moments that are beside an adapter; without them it says so."""
    if checkpoint_to_resume(arguments):
        return []  # Which has moments of its own.
    try:
        adapter = LoraAdapter(source, argument="init_from")
        return [CarriedMoments(source, moments_beside(adapter, list(lora_parameters(model))))]
    except (OSError, ValueError) as error:
        _say_fresh(source, error, arguments)
        return []


class CarriedMoments(CarryMomentsCallback):
    """Carries moments over that nobody asked for: where it cannot, training begins without."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        source = self.teacher.folder
        try:
            super().on_train_begin(args, state, control, **kwargs)
        except WrongKind:
            if args.process_index == 0:
                name = type(plain(kwargs["optimizer"])).__name__
                print(f"start: the moments of {source} are not carried: {name} keeps none")
        except (ValueError, TypeError) as error:
            _say_fresh(source, error, args)
        else:
            if args.process_index == 0:
                steps = max(moment.step for moment in self.moments.values())
                print(f"start: Adam goes on with the moments of {source}, {steps:.0f} steps old")


def _say_fresh(source: Any, why: Exception, arguments: TrainingArguments) -> None:
    if arguments.process_index == 0:
        print(f"start: Adam starts fresh, the moments of {source} are not carried: {why}")
