"""Weights of a saved model, read tensor by tensor from safetensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from ..files import (
    FLOAT_DTYPES,
    hub_pickles,
    inside,
    opened,
    parsed_json,
    read_json,
    resolve_folder,
)
from .recognition import Position

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_ENTRIES = 1 << 19
_BLOCKS_MAPPED = 16
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def shard_index(folder: Path, argument: str) -> dict[str, str]:
    """The files of a sharded checkpoint's tensors, all of them in the folder.

    Raises:
        ValueError: if the index is damaged, or leads out of the folder.
    """
    index = read_json(folder / _INDEX, argument, _Index)["weight_map"]
    for name in sorted(set(index.values())):
        inside(folder, name, argument)
    return index


class Checkpoint:
    """The tensors of a model folder in safetensors, one file or sharded, opened one at a time.

    Args:
        path_or_id: a folder or Hub repository.
        argument: by which the user gave it; the messages of errors begin with it.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        FileNotFoundError: if there is no checkpoint, or a shard is missing.
        ValueError: if it is a pickle, truncated, or its index leads out of the folder.
    """

    def __init__(
        self, path_or_id: str | os.PathLike, *, argument: str, revision: str | None = None
    ) -> None:
        self.folder = resolve_folder(path_or_id, argument=argument, revision=revision)
        self.argument = argument
        self._source, self._revision = path_or_id, revision
        self._file_of: dict[str, Path] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self._shards():
            with opened(path, argument) as file:
                for key in file.keys():
                    self._file_of[key] = path
                    tensor = file.get_slice(key)
                    self.shapes[key] = tuple(tensor.get_shape())
                    self.dtypes[key] = tensor.get_dtype()

    def _shards(self) -> list[Path]:
        if (self.folder / _SINGLE).is_file():  # As in transformers, before an index.
            paths = [self.folder / _SINGLE]
        elif (self.folder / _INDEX).is_file():
            files = set(shard_index(self.folder, self.argument).values())
            paths = [self.folder / name for name in sorted(files)]
        else:
            if any(self.folder.glob("pytorch_model*.bin")):
                self._refuse_pickle(self.folder, self.folder)
            if hub_pickles(self._source, self._revision):
                self._refuse_pickle(self._source, "converted")
            raise FileNotFoundError(
                f"{self.argument}: the folder {self.folder} has neither {_SINGLE} nor {_INDEX}"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.argument}: {self.folder} lacks the shards {', '.join(missing)}"
            )
        return paths

    def _refuse_pickle(self, source: str | os.PathLike, target: str | os.PathLike) -> NoReturn:
        raise ValueError(
            f"{self.argument}: {os.fspath(source)} holds its weights as a pickle, which can run "
            'code when it is loaded. If you trust it, convert it once: python -c "from '
            "transformers import AutoModelForCausalLM; AutoModelForCausalLM."
            f"from_pretrained('{os.fspath(source)}').save_pretrained('{os.fspath(target)}')\""
        )

    def tensor(self, key: str) -> Tensor:
        """One tensor; its file is reopened each time, so that no mapped pages pile up."""
        with opened(self._file_of[key], self.argument) as file:
            return file.get_tensor(key)

    def blocks(self, key: str, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The tensor in blocks of whole rows: the first row's index and the block.

        `rows` stops after that many of them. Blocks have about `BLOCK_ENTRIES` entries, and the
        file is opened anew after some of them, since pages that were read stay mapped until it is
        closed: a tensor of any size is read in bounded memory.
        """
        shape = self.shapes[key]
        last = math.prod(shape[:1]) if rows is None else min(rows, *shape[:1])
        step = max(1, BLOCK_ENTRIES // max(1, math.prod(shape[1:])))
        for start in range(0, last, _BLOCKS_MAPPED * step):
            end = min(start + _BLOCKS_MAPPED * step, last)
            with opened(self._file_of[key], self.argument) as file:
                if not shape:
                    yield 0, file.get_tensor(key)
                    return
                tensor = file.get_slice(key)
                for first in range(start, end, step):
                    yield first, tensor[first : min(first + step, end)]

    def stored_bytes(self, key: str) -> int:
        """Size of a tensor in its file."""
        return math.prod(self.shapes[key]) * _ITEM_SIZES.get(self.dtypes[key], 8)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def entries(self, key: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """A few entries of a matrix of floating numbers, in its dtype.

        They are read one by one: around an entry of a mapped file the system would read ahead,
        megabytes perhaps.
        """
        cols = self.shapes[key][1]
        dtype = FLOAT_DTYPES[self.dtypes[key]]
        stored = bytearray()
        with open(self._file_of[key], "rb", buffering=0) as file:
            for row, col in positions:
                file.seek(self._offset_of(key) + (row * cols + col) * dtype.itemsize)
                stored += file.read(dtype.itemsize)
        return torch.frombuffer(stored, dtype=dtype)

    def _offset_of(self, key: str) -> int:
        """Where a tensor begins in its file."""
        path = self._file_of[key]
        if path not in self._offsets:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = parsed_json(file.read(length))
            header.pop("__metadata__", None)
            self._offsets[path] = {k: 8 + length + e["data_offsets"][0] for k, e in header.items()}
        return self._offsets[path][key]
