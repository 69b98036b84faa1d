"""Factors of layers on the disk, one file for each, so that a job goes on where it was killed."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ...files import (
    LazyMapping,
    is_workspace,
    opened,
    read_json,
    workspace,
    write_json,
    write_tensors,
)
from ..low_rank import LowRankFactors

logger = logging.getLogger(__name__)

_PLAN, _LOCK, _RESULT = "job.json", "job.lock", "adapter"
# All that is ever there, beside workspaces.
_OURS = re.compile(r"job\.lock|job\.json|layer-\d+\.safetensors|adapter")
_PARTS = ("U", "S", "Vh")
_ARGUMENT = "output_dir"
_FORMAT_VERSION = 1


class LayerStore(LazyMapping[LowRankFactors]):
    """Module name to factors, read one layer at a time; a context manager that holds a lock.

    The mapping has the layers that are done. A folder left by a job with other inputs is started
    afresh; one that something else made is refused.

    Args:
        folder: working folder of the job.
        names: all layers of the job, in the order of the mapping.
        inputs: what the factors depend on, as JSON values.

    Raises:
        ValueError: if another process works in the folder, or it holds files of others.
    """

    def __init__(
        self, folder: str | os.PathLike, names: Sequence[str], inputs: Mapping[str, Any]
    ) -> None:
        self.folder = Path(folder)
        self._files = {
            name: self.folder / f"layer-{index:05d}.safetensors" for index, name in enumerate(names)
        }
        # Through JSON, or tuples and lists would differ.
        self._inputs = json.loads(
            json.dumps({"format_version": _FORMAT_VERSION, "layers": list(names), **inputs})
        )
        self._done: set[str] = set()
        self._lock = FileLock(self.folder / _LOCK)

    def __enter__(self) -> LayerStore:
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is needed as a working folder and is a file; move it")
        self._refuse_foreign()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by another process that extracts to the same output; "
                "wait for it, or choose another output_dir"
            ) from None
        try:
            self._resume_or_begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @property
    def result(self) -> Path:
        """Where in the folder what is made of all layers may be kept; nothing else is let in."""
        return self.folder / _RESULT

    def _foreign(self) -> set[str]:
        names = {path.name for path in self.folder.glob("*")}
        foreign = {name for name in names if not (_OURS.fullmatch(name) or is_workspace(name))}
        if _inputs_of(self.folder / _PLAN) is None:
            foreign |= {name for name in names if not name.startswith(".") and name != _LOCK}
        return foreign

    def _refuse_foreign(self) -> None:
        foreign = self._foreign()
        if foreign:
            raise ValueError(
                f"{self.folder} is needed as a working folder and holds something else, "
                f"{min(foreign)}; move it"
            )

    def _resume_or_begin(self) -> None:
        plan = self.folder / _PLAN
        if plan.is_file() and self._inputs != _inputs_of(plan):
            logger.warning("%s was left by a job with other inputs; starting afresh", self.folder)
            for path in self.folder.glob("layer-*.safetensors"):
                path.unlink()
        write_json(plan, self._inputs)
        self._done = {name for name, path in self._files.items() if _is_complete(path, name)}

    def save(self, name: str, factors: LowRankFactors) -> None:
        """Put the factors of a layer on the disk, whole or not at all.

        Raises:
            OSError: if the disk is full.
        """
        tensors = {part: getattr(factors, part) for part in _PARTS}
        metadata = {"name": name, "norm": factors.norm.hex()}
        write_tensors(self._files[name], tensors, metadata)
        self._done.add(name)

    @property
    def names(self) -> list[str]:
        """The layers that are done."""
        return [name for name in self._files if name in self._done]

    def __contains__(self, name: object) -> bool:
        return name in self._done

    def __getitem__(self, name: str) -> LowRankFactors:
        tensors, norm = self._read(name, _PARTS)
        return LowRankFactors(**tensors, norm=norm)

    def singular_values(self, name: str) -> tuple[Tensor, float]:
        """S and the norm of a layer, without reading its vectors."""
        tensors, norm = self._read(name, ("S",))
        return tensors["S"].clone(), norm  # The tensor read keeps its file mapped.

    def _read(self, name: str, parts: Sequence[str]) -> tuple[dict[str, Tensor], float]:
        if name not in self:
            raise KeyError(name)
        with opened(self._files[name], _ARGUMENT) as file:
            norm = float.fromhex(file.metadata()["norm"])
            return {part: file.get_tensor(part) for part in parts}, norm

    def remove(self) -> None:
        """Delete the folder, once its results are elsewhere; the lock goes with it.

        If somebody has put files of his own there, nothing is deleted.
        """
        foreign = self._foreign()
        if foreign:
            logger.warning(
                "%s was to be deleted and holds %s, which is not of this job; delete the rest by "
                "hand",
                self.folder,
                min(foreign),
            )
            return
        # Out of the way first: a process that starts now must not work in a folder that vanishes.
        with workspace(self.folder.parent, self.folder.name) as gone:
            os.rename(self.folder, gone / self.folder.name)
            self._lock.release()


def _inputs_of(plan: Path) -> dict[str, Any] | None:
    """What a job of ours depends on; None if there is no plan, or it is another program's."""
    try:
        inputs = read_json(plan, _ARGUMENT)
    except (OSError, ValueError):
        return None
    return inputs if {"format_version", "layers"} <= inputs.keys() else None


def _is_complete(path: Path, name: str) -> bool:
    if not path.is_file():
        return False
    try:
        with opened(path, _ARGUMENT) as file:
            return (file.metadata() or {}).get("name") == name and set(file.keys()) == set(_PARTS)
    except ValueError:
        return False
