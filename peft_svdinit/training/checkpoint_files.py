"""The files of a checkpoint: whether one is read to its end, and which belong together.

No pickle is opened: of what torch saved only the archive around it is read, and of an index that
is a pickle the words in it.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import opened, read_json

# Of each process that shares an optimizer or weights by ZeRO.
_OF_PROCESS = re.compile(r"zero_pp_rank_(\d+)_.*_(model|optim)_states\.pt$")


class Fault(Exception):
    """What ails a checkpoint, as a sentence about it."""


def lacking(name: str) -> Fault:
    """The fault of a file that is missing."""
    return Fault(f"it has no {name}")


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a `Fault` if it is torn."""
    try:
        # The Trainer writes losses as they are.
        return read_json(path, "checkpoint", constants=True)
    except ValueError:
        raise _torn(path) from None


def check_tensors(path: Path) -> None:
    """Raise a `Fault` unless a safetensors file ends where its header says."""
    try:
        with opened(path, "checkpoint"):
            pass
    except ValueError:
        raise _torn(path) from None


def check_archive(path: Path) -> None:
    """Raise a `Fault` unless what `torch.save` wrote ends with the directory of a zip archive."""
    try:
        with zipfile.ZipFile(path):
            pass
    except zipfile.BadZipFile:
        raise _torn(path) from None


def shards_of(index: Path) -> list[str]:
    """The files that an index of weights names."""
    named = object_in(index).get("weight_map")
    if not isinstance(named, dict):
        raise _torn(index)
    return sorted({str(name) for name in named.values()})


def parts_of(folder: Path) -> Iterator[str]:
    """What torch.distributed.checkpoint reads of a folder; its `.metadata`, written last, names it.

    Relative to the folder that it is in, as the names that follow here.
    """
    metadata = folder / ".metadata"
    yield f"{folder.name}/.metadata"
    try:
        words = [word for _, word, _ in pickletools.genops(metadata.read_bytes())]
    except ValueError:
        raise _torn(metadata) from None
    yield from sorted({f"{folder.name}/{word}" for word in words if _is_part(word)})


def states_of(folder: Path) -> Iterator[str]:
    """What DeepSpeed reads of `global_step<n>`; it writes `latest` beside it after all of that."""
    yield "latest"
    if not any(folder.glob("*_model_states.pt")):
        yield f"{folder.name}/mp_rank_00_model_states.pt"
    for path in sorted(folder.glob("*.pt")):
        if found := _OF_PROCESS.search(path.name):
            before, after = path.name[: found.start(1)], path.name[found.end(1) :]
            names = (f"{before}{process}{after}" for process in range(int(found[1])))
            yield from (f"{folder.name}/{name}" for name in names)


def _is_part(word: object) -> bool:
    return isinstance(word, str) and word.endswith(".distcp")


def _torn(path: Path) -> Fault:
    return Fault(f"its {path.name} is torn")
