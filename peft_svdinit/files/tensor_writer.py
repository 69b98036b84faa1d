"""Writing a safetensors file tensor by tensor, so that memory holds one of them.

The format: the header's length as eight little-endian bytes, the header as JSON padded with spaces
to a multiple of eight, then the tensors without gaps (github.com/huggingface/safetensors). The
bytes are those that `safetensors.torch.save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from .atomic import replacing

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# Widest first, which keeps every tensor aligned to the size of its entries.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_NAMES)
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""The dtypes that can be written, as the format names them."""
FLOAT_DTYPES = {name: dtype for dtype, name in _NAMES.items() if dtype.is_floating_point}
"""The dtypes of weights that are not quantised, as the format names them."""


class TensorWriter:
    """A context manager that writes the tensors of `layout` to `path`, each as it comes.

    They may come in any order; the file does not depend on it. On leaving the context everything
    is on the disk. After an error the file is worthless: write inside `atomic.replacing`.

    Args:
        path: file to write.
        layout: dtype and shape of every tensor, by name.
        metadata: entries of the header, text to text.

    Raises:
        TypeError: for a dtype that is none of weights or indices, or metadata that is not text.
        ValueError: for the one name that the format reserves.
        OSError: if the disk is full, then or on a later write.
    """

    def __init__(
        self, path: str | os.PathLike, layout: Layout, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
        header = self._header(metadata or {})
        self._missing = set(self._layout)
        self._file = open(path, "wb")
        self._start = len(header)
        try:
            self._file.write(header)
        except BaseException:
            self._abandon()
            raise

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        wrong = [k for k, v in metadata.items() if not (isinstance(k, str) and isinstance(v, str))]
        if wrong:
            raise TypeError(f"metadata must map text to text, the value of {wrong[0]!r} does not")
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        if "__metadata__" in self._layout:
            raise ValueError("layout: no tensor can be named __metadata__, safetensors reserves it")
        for name, (dtype, _) in self._layout.items():
            if dtype not in _NAMES:
                known = ", ".join(str(known) for known in _NAMES)
                raise TypeError(f"layout: {name} is {dtype}, which must be one of {known}")
        self._offsets: dict[str, int] = {}
        offset = 0
        for name in sorted(self._layout, key=lambda name: (_ORDER.index(self._dtype(name)), name)):
            dtype, shape = self._layout[name]
            end = offset + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            self._offsets[name] = offset
            offset = end
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _dtype(self, name: str) -> torch.dtype:
        return self._layout[name][0]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device and of any strides.

        Raises:
            ValueError: if the layout has no such tensor, has it of another dtype or shape, or it
                was written before.
        """
        if name not in self._layout:
            raise ValueError(f"{self.path}: the layout has no tensor {name}")
        if name not in self._missing:
            raise ValueError(f"{self.path}: tensor {name} is written a second time")
        found, expected = (tensor.dtype, tuple(tensor.shape)), self._layout[name]
        if found != expected:
            raise ValueError(
                f"{self.path}: tensor {name} is {found[0]} of shape {found[1]}, but the layout has "
                f"{expected[0]} of shape {expected[1]}"
            )
        entries = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(entries.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        if self._missing:
            self._abandon()
            raise ValueError(
                f"{self.path}: {len(self._missing)} tensors of the layout were not written, "
                f"{min(self._missing)} among them"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            self._abandon()
            raise
        self._file.close()

    def _abandon(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # a full disk was reported by the write that failed


@contextmanager
def replacing_tensors(
    path: str | os.PathLike, layout: Layout, metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """A `TensorWriter` whose file is at `path` in the end, whole, or not at all."""
    with replacing(path) as temporary, TensorWriter(temporary, layout, metadata) as writer:
        yield writer


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are in memory, atomically."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing_tensors(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
