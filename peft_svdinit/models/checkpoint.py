"""Weights of a saved model, read tensor by tensor from safetensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from jaxtyping import Float
from torch import Tensor

from ..files import TensorReader, hub_pickles, inside, read_json, resolve_folder
from .recognition import Position

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_ENTRIES = 1 << 19
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
        self._reader_of: dict[str, TensorReader] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self._shards():
            reader = TensorReader(path, argument)
            self._reader_of |= dict.fromkeys(reader.shapes, reader)
            self.shapes |= reader.shapes
            self.dtypes |= reader.dtypes

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
        """One tensor."""
        with self._reader_of[key].opened() as file:
            return file.tensor(key)

    def blocks(self, key: str, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The tensor in blocks of whole rows: the first row's index and the block.

        `rows` stops after that many of them. Blocks have about `BLOCK_ENTRIES` entries: a tensor of
        any size is read in bounded memory.
        """
        shape = self.shapes[key]
        last = math.prod(shape[:1]) if rows is None else min(rows, *shape[:1])
        step = max(1, BLOCK_ENTRIES // max(1, math.prod(shape[1:])))
        if not shape:
            yield 0, self.tensor(key)
            return
        with self._reader_of[key].opened() as file:
            for first in range(0, last, step):
                yield first, file.rows(key, first, min(first + step, last))

    def stored_bytes(self, key: str) -> int:
        """Size of a tensor in its file."""
        return math.prod(self.shapes[key]) * _ITEM_SIZES.get(self.dtypes[key], 8)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({reader.path for reader in self._reader_of.values()})

    def entries(self, key: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """A few entries of a matrix, in its dtype."""
        cols = self.shapes[key][1]
        with self._reader_of[key].opened() as file:
            return file.entries(key, [row * cols + col for row, col in positions])
