"""A model's parameters in a checkpoint, whatever it calls them and however it lays them out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..files import FLOAT_DTYPES
from .architecture import model_skeleton
from .checkpoint import BLOCK_ENTRIES, Checkpoint
from .conversion import Conversion, stored_layout
from .recognition import Position


class StoredParameters:
    """Parameters and persistent buffers by the model's own names, read one at a time.

    Those that are stored under another name, or in a layout of their own, are found and made as
    transformers does when it loads the model. Tensors that the model has no place for are there
    too, by the names that they have in the file.

    Args:
        checkpoint: the tensors.
        model: the model on the meta device; that of the checkpoint's own config.json if None.

    Attributes:
        shapes: of all that is stored, by name.
        unknown: names that the model does not have.
        tied_to: every parameter of the model, and the first one that it is tied to, mostly itself.

    Raises:
        ValueError: if the tensors that one parameter is made of do not fit together.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> None:
        self.checkpoint, self.argument = checkpoint, checkpoint.argument
        self.model = model or model_skeleton(checkpoint.folder, checkpoint.argument)
        stored = {
            key: (shape, FLOAT_DTYPES.get(checkpoint.dtypes[key], torch.uint8))
            for key, shape in checkpoint.shapes.items()
        }
        try:
            layout = stored_layout(self.model, stored)
        except ValueError as error:
            raise ValueError(f"{checkpoint.argument}: {checkpoint.folder}: {error}") from error
        self._keys = layout.renamed | layout.unknown
        self._made = layout.converted
        self.unknown = set(layout.unknown)
        self.shapes = {name: checkpoint.shapes[key] for name, key in self._keys.items()}
        self.shapes |= {name: made.shapes[name] for name, made in self._made.items()}
        self._tied = _tied_parameters(self.model)
        self.tied_to = {name: group[0] for name, group in self._tied.items()}

    def stored(self, name: str) -> str | None:
        """The parameter that the checkpoint holds in its place: itself, or one tied to it."""
        for one in (name, *self._tied.get(name, ())):
            if one in self.shapes:
                return one
        return None

    def stored_once(self) -> dict[str, str]:
        """Every parameter of the model with the one stored in its place, each of these once."""
        found: dict[str, str] = {}
        for name in self.tied_to:
            stored = self.stored(name)
            if stored is not None:
                found.setdefault(stored, name)
        return {name: stored for stored, name in found.items()}

    def dtype(self, name: str) -> str:
        """As safetensors calls it; of several tensors, that of one that is no floating number."""
        dtypes = {self.checkpoint.dtypes[key] for key in self._sources(name)}
        return min(dtypes, key=lambda dtype: (dtype in FLOAT_DTYPES, dtype))

    def _sources(self, name: str) -> list[str]:
        return self._made[name].keys if name in self._made else [self._keys[name]]

    def stored_bytes(self, name: str) -> int:
        """What reading it reads."""
        return sum(map(self.checkpoint.stored_bytes, self._sources(name)))

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        made = self._made.get(name)
        if made is None:
            return self.checkpoint.tensor(self._keys[name])
        return self._converted(name, made, made.keys)

    def _converted(self, name: str, made: Conversion, keys: Sequence[str]) -> Tensor:
        return made(self.model, {key: self.checkpoint.tensor(key) for key in keys})[name]

    def blocks(self, name: str, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The parameter in blocks of whole rows, as `Checkpoint.blocks`.

        What is made of several tensors is in memory as a whole, a stack of experts as many of them
        as a block has.
        """
        made = self._made.get(name)
        if made is None:
            yield from self.checkpoint.blocks(self._keys[name], rows)
            return
        shape = self.shapes[name]
        last = shape[0] if rows is None else min(rows, shape[0])
        step = max(1, BLOCK_ENTRIES // max(1, math.prod(shape[1:])))
        by_row = made.rows()
        whole = self.tensor(name) if by_row is None else None
        for start in range(0, last, step):
            end = min(start + step, last)
            if whole is not None:
                yield start, whole[start:end]
            elif by_row is not None:
                keys = [key for row in by_row[start:end] for key in row]
                yield start, self._converted(name, made, keys)

    def entries(self, name: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """A few entries of a matrix of floating numbers, in its dtype."""
        if name not in self._made:
            return self.checkpoint.entries(self._keys[name], positions)
        rows, columns = zip(*positions, strict=True)
        return self.tensor(name)[list(rows), list(columns)]


def _tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Every parameter and all that are tied to it, itself among them."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: group for group in groups.values() for name in group}
