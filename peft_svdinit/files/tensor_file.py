"""Reading an adapter's safetensors file: checked, without its pages piling up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .locate import refuse_pickle
from .opening import opened, refuse_non_float
from .tensor_writer import DTYPES
from .wrong_kind import WrongKind

# Pages of the mapped file that were read count as resident until it is closed.
_BYTES_MAPPED = 1 << 25


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
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._spelled: dict[str, str] = {}
        with opened(path, argument) as file:
            self.metadata: dict[str, str] = dict(file.metadata() or {})
            for key in file.keys():
                stored = file.get_slice(key)
                self.shapes[key], self._spelled[key] = tuple(stored.get_shape()), stored.get_dtype()

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
        with opened(self.path, self.argument) as file:
            return file.get_tensor(key)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A reader of tensors by key, in float32, for as long as the context lasts.

        The file is mapped again after some tens of megabytes, which releases what was read.

        Raises:
            ValueError: on reading a tensor with NaN or infinite entries.
        """
        file = safe_open(self.path, framework="pt")
        mapped = 0

        def read(key: str) -> Tensor:
            nonlocal file, mapped
            dtype = DTYPES.get(self._spelled[key], torch.float64)
            mapped += math.prod(self.shapes[key]) * dtype.itemsize
            if mapped > _BYTES_MAPPED:
                file, mapped = safe_open(self.path, framework="pt"), 0
            tensor = file.get_tensor(key).float()
            if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
                raise ValueError(
                    f"{self.argument}: {key} in {self.path} has NaN or infinite entries"
                )
            return tensor

        yield read
