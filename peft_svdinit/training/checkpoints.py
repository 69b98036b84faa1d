"""Which of a Trainer's checkpoints is whole, so that training can go on from it.

The Trainer writes a checkpoint file by file under its final name, `trainer_state.json` last; other
processes add their random state when they come to it, and callbacks add theirs afterwards. A kill
leaves a part of that, as it does of an old checkpoint that is being deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint_files import (
    Fault,
    check_archive,
    check_tensors,
    lacking,
    object_in,
    parts_of,
    shards_of,
    states_of,
)

_NOTE = "checkpoint"
_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# By one of which the Trainer knows a checkpoint.
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors",
    "*/adapter_model.bin", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp*", "global_step*",
)  # fmt: skip
_TENSORS = ("*.safetensors", "*/adapter_model.safetensors")
# What `torch.save` wrote and a resume loads; other pickles in the folder are not its concern.
_ARCHIVES = (
    "pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin", "optimizer*.pt",
    "optimizer*.bin", SCHEDULER_NAME, "scaler.pt", "global_step*/*.pt",
)  # fmt: skip

# Names the files of a checkpoint that a run needs besides the Trainer's own.
Needed = Callable[[Path], Iterable[str]]


def note_in(state: TrainerState, *, processes: int, save_only_model: bool) -> None:
    """Let the checkpoints of a run say how many processes it has and what is saved of it."""
    kept: Any = state.stateful_callbacks
    attributes = {"processes": processes, "save_only_model": save_only_model}
    kept[_NOTE] = {"args": {}, "attributes": attributes}


def newest_whole(
    folder: Path, needed: Needed = lambda checkpoint: ()
) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint of the latest step that is whole, and what ails each later one, by its name.

    Args:
        folder: of the run; it need not exist.
        needed: as `fault_of` takes it.
    """
    steps = {path: _step_of(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = {path: step for path, step in steps.items() if step is not None and path.is_dir()}
    faults: dict[str, str] = {}
    for path in sorted(found, key=found.__getitem__, reverse=True):
        fault = fault_of(path, needed)
        if fault is None:
            return path, faults
        faults[path.name] = fault
    return None, faults


def fault_of(checkpoint: Path, needed: Needed = lambda checkpoint: ()) -> str | None:
    """The first thing in a checkpoint that a resume would miss, in words; None if it is whole.

    A checkpoint that was saved without the optimizer (`save_only_model`) is whole without it. One
    that does not say so (`note_in`), and has neither optimizer, schedule nor random state, is taken
    for such a one.

    Args:
        checkpoint: its folder.
        needed: called after all else was found.
    """
    try:
        for name in _must_have(checkpoint):
            if not (checkpoint / name).is_file():
                raise lacking(name)
            if name.endswith(".pth"):
                check_archive(checkpoint / name)
        for path in _there(checkpoint, _TENSORS):
            check_tensors(path)
        for path in _there(checkpoint, _ARCHIVES):
            check_archive(path)
        for name in needed(checkpoint):
            if not (checkpoint / name).is_file():
                raise lacking(name)
    except Fault as fault:
        return str(fault)
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def _there(checkpoint: Path, patterns: Iterable[str]) -> list[Path]:
    """Files and folders of these names; none in a hidden folder, where others are written first."""
    found = {path for pattern in patterns for path in checkpoint.glob(pattern)}
    return sorted(path for path in found if path.relative_to(checkpoint).parts[0][0] != ".")


def _step_of(path: Path) -> int | None:
    named = _NUMBERED.fullmatch(path.name)
    return int(named[1]) if named else None


def _must_have(checkpoint: Path) -> Iterator[str]:
    """The files that there must be, each before what is read of it for the next."""
    yield TRAINER_STATE_NAME
    state = _state(checkpoint)
    if not _there(checkpoint, _WEIGHTS):
        raise Fault("it has no weights, such as adapter_model.safetensors or model.safetensors")
    for path in checkpoint.glob("config.json"):
        object_in(path)
    for path in checkpoint.glob("*.index.json"):
        yield from shards_of(path)
    folders = sorted(path for path in checkpoint.iterdir() if path.is_dir())
    for path in folders:
        if path.name.startswith(("pytorch_model_fsdp_", "optimizer_")):
            yield from parts_of(path)
    split = [path for path in folders if path.name.startswith("global_step")]
    for path in split:
        yield from states_of(path)
    processes = _processes(checkpoint, state)
    if processes and not split:
        yield SCHEDULER_NAME
        if not any(checkpoint.glob("*optimizer*")):
            yield OPTIMIZER_NAME
    ranks = [f"_{process}" for process in range(processes)] if processes > 1 else [""] * processes
    yield from (f"rng_state{rank}.pth" for rank in ranks)


def _state(checkpoint: Path) -> dict[str, Any]:
    state = object_in(checkpoint / TRAINER_STATE_NAME)
    step, named = state.get("global_step"), _step_of(checkpoint)
    if type(step) is not int:
        raise Fault(f"its {TRAINER_STATE_NAME} has no global_step")
    if named not in (None, step):
        raise Fault(f"its {TRAINER_STATE_NAME} is of step {step}")
    return state


def _processes(checkpoint: Path, state: Mapping[str, Any]) -> int:
    """How many processes saved their random state, 0 if the model alone was saved."""
    try:
        note = state["stateful_callbacks"][_NOTE]["attributes"]
        return 0 if note["save_only_model"] else int(note["processes"])
    except (KeyError, TypeError, ValueError):
        pass
    there = {path.name for path in checkpoint.glob("rng_state*.pth")}
    if "rng_state.pth" in there:
        return 1
    ranks = [int(name[10:-4]) for name in there if name[10:-4].isdigit()]
    kept = _there(checkpoint, (SCHEDULER_NAME, "*optimizer*", "global_step*"))
    return max(ranks) + 1 if ranks else int(bool(kept))
