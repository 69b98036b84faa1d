"""Reading an adapter's safetensors file: checked, in float32, without its pages piling up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .locate import refuse_pickle
from .opening import opened
from .tensor_writer import FLOAT_DTYPES
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
        TypeError: if a tensor is quantised or no floating-point number.
    """

    def __init__(self, path: Path, argument: str = "adapter") -> None:
        refuse_pickle(path, argument)
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: there is no file {path}")
        self.path, self.argument = path, argument
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        with opened(path, argument) as file:
            self.metadata: dict[str, str] = dict(file.metadata() or {})
            for key in file.keys():
                stored = file.get_slice(key)
                dtype = stored.get_dtype()
                if dtype not in FLOAT_DTYPES:
                    raise WrongKind(
                        f"{argument}: {key} in {path} is stored as {dtype}; an adapter must be in "
                        f"{', '.join(FLOAT_DTYPES)}: dequantise it first"
                    )
                self.shapes[key], self.dtypes[key] = tuple(stored.get_shape()), FLOAT_DTYPES[dtype]

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
            mapped += math.prod(self.shapes[key]) * self.dtypes[key].itemsize
            if mapped > _BYTES_MAPPED:
                file, mapped = safe_open(self.path, framework="pt"), 0
            tensor = file.get_tensor(key)
            if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
                raise ValueError(
                    f"{self.argument}: {key} in {self.path} has NaN or infinite entries"
                )
            return tensor.float()

        yield read
