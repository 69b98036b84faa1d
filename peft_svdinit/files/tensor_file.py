"""Reading an adapter's safetensors file: the dtypes and the entries of its tensors checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .locate import refuse_pickle
from .opening import refuse_non_float
from .tensor_reader import TensorReader
from .tensor_writer import DTYPES
from .wrong_kind import WrongKind


class TensorFile:
    """Shapes, dtypes and metadata of a safetensors file, and its tensors on demand.

    Args:
        path: the file.
        argument: by which the user gave it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is a pickle, truncated, or no safetensors file.
    """

    def __init__(self, path: Path, argument: str = "adapter") -> None:
        refuse_pickle(path, argument)
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: there is no file {path}")
        self.path, self.argument = path, argument
        self._reader = TensorReader(path, argument)
        self.metadata, self.shapes = self._reader.metadata, self._reader.shapes
        self._spelled = self._reader.dtypes

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            TypeError: if it is none that can be written again.
        """
        if self._spelled[key] not in DTYPES:
            raise WrongKind(
                f"{self.argument}: {key} in {self.path} is stored as {self._spelled[key]}, which "
                f"must be one of {', '.join(DTYPES)}: convert it first"
            )
        return DTYPES[self._spelled[key]]

    def require_floats(self, keys: Iterable[str]) -> None:
        """Raise TypeError if a tensor is quantised, or no floating-point number."""
        for key in keys:
            refuse_non_float(f"{self.argument}: {key} in {self.path}", self._spelled[key])

    def as_stored(self, key: str) -> Tensor:
        """A tensor in its own dtype, unchecked."""
        with self._reader.opened() as file:
            return file.tensor(key)

    def finite(self, key: str) -> Tensor:
        """A tensor in float32.

        Raises:
            ValueError: if it has NaN or infinite entries.
        """
        tensor = self.as_stored(key).float()
        if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise ValueError(f"{self.argument}: {key} in {self.path} has NaN or infinite entries")
        return tensor
