"""Reading a safetensors file tensor by tensor: the header once, and nothing of it mapped.

`safe_open` parses the whole header each time, so that a file opened anew for each of its layers
costs the square of their number; kept open, it keeps the pages that were read resident, and tensors
that share them.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .opening import opened
from .tensor_writer import DTYPES
from .wrong_kind import WrongKind

# Beside those that can be written.
_READ_ONLY = {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
_DTYPES = DTYPES | _READ_ONLY


class _Place(NamedTuple):
    """The bytes of a tensor in its file."""

    first: int
    last: int


class TensorReader:
    """Shapes, dtypes and metadata of a safetensors file, and its tensors on demand.

    The file is open while it is read and no longer: there is nothing to close, and threads and
    processes may share a reader. A file that was changed or replaced meanwhile is refused.

    Args:
        path: the file.
        argument: by which the user gave it; the messages of errors begin with it.

    Attributes:
        shapes: by key.
        dtypes: by key, as the format names them.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no safetensors file, or truncated.
    """

    def __init__(self, path: Path, argument: str) -> None:
        self.path, self.argument = path, argument
        with open(path, "rb") as file:
            self._stamp = _stamp(file)
            with opened(path, argument) as checked:
                keys = checked.keys()
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.get("__metadata__") or {}
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(header[k]["shape"]) for k in keys}
        self.dtypes: dict[str, str] = {key: header[key]["dtype"] for key in keys}
        begin, offsets = 8 + length, {key: header[key]["data_offsets"] for key in keys}
        self._places = {k: _Place(begin + one, begin + end) for k, (one, end) in offsets.items()}

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """The tensors, for as long as the context lasts.

        A ValueError within the context gets argument and path before its message.

        Raises:
            ValueError: if the file is not the one whose header was read.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _stamp(file) != self._stamp:
                    raise ValueError(
                        "it was changed or replaced after it had been opened; open it again"
                    )
                yield OpenTensors(self, file)
        except ValueError as error:
            raise ValueError(f"{self.argument}: {self.path}: {error}") from error

    def place(self, key: str) -> _Place:
        return self._places[key]


@dataclass(frozen=True)
class OpenTensors:
    """What an open file holds; every tensor read is a copy of its own, in its dtype."""

    _reader: TensorReader
    _file: io.FileIO

    def tensor(self, key: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: if the file has no tensor of this name.
            ValueError: if the file is shorter than its header says.
            TypeError: if torch has no such dtype.
        """
        return self._read(key, self._reader.shapes[key], 0)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows from `start` up to `stop` of a tensor that has such rows."""
        rows, *rest = self._reader.shapes[key]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {rows} of {key}")
        return self._read(key, (stop - start, *rest), start * math.prod(rest))

    def entries(self, key: str, indices: Sequence[int]) -> Tensor:
        """A few entries by their places in the tensor, counted row by row; nothing else is read."""
        found = self._empty(key, (len(indices),))
        stored, size = _bytes_of(found), found.itemsize
        for place, index in enumerate(indices):
            self._fill(stored[place * size : (place + 1) * size], key, index * size)
        return found

    def _read(self, key: str, shape: Sequence[int], start: int) -> Tensor:
        """Entries of this shape that follow each other, from index `start` on."""
        tensor = self._empty(key, shape)
        self._fill(_bytes_of(tensor), key, start * tensor.itemsize)
        return tensor

    def _empty(self, key: str, shape: Sequence[int]) -> Tensor:
        spelled = self._reader.dtypes[key]
        if spelled not in _DTYPES:
            raise WrongKind(
                f"{self._reader.argument}: {key} in {self._reader.path} is stored as {spelled}, "
                "which cannot be read: convert it first"
            )
        return torch.empty(shape, dtype=_DTYPES[spelled])

    def _fill(self, stored: memoryview, key: str, offset: int) -> None:
        """Read bytes of a tensor, from `offset` in it on."""
        place = self._reader.place(key)
        if place.first + offset + len(stored) > place.last:
            raise ValueError(f"the bytes of {key} are fewer than its shape needs")
        self._file.seek(place.first + offset)
        while stored:
            count = self._file.readinto(stored)
            if not count:
                raise ValueError("it is shorter than its header says: truncated while it was read")
            stored = stored[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _stamp(file: io.IOBase) -> tuple[int, ...]:
    """By what a change of a file, or another one in its place, is noticed."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
