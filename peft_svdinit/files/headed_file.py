"""Safetensors files whose header's one metadata entry is JSON: factors, masks, scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_text import parsed_json
from .locate import resolve_file
from .opening import opened
from .schema import shortened, validated
from .tensor_writer import Layout, TensorWriter, replacing_tensors, write_tensors

FORMAT_VERSION = 1
_DAMAGED = "damaged header: "
Header = TypeVar("Header")


@dataclass(frozen=True)
class HeadedFile:
    """One kind of such files.

    Attributes:
        key: of the metadata entry, by which files of the kind are told.
        name: of the file in a folder or repository.
        what: what it holds, and how that is made.
    """

    key: str
    name: str
    what: str

    def target(self, path: str | os.PathLike) -> Path:
        """Where to write: the `.safetensors` file that is named, or `name` in a folder.

        Raises:
            ValueError: if the file that is named is there and of another kind: weights, say.
        """
        target = Path(path).expanduser()
        if target.suffix != ".safetensors":
            return target / self.name
        if target.is_file() and not self._is_at(target):
            raise ValueError(
                f"{target} is a file of another kind than the one to be written there, and would "
                "be lost; choose another name, or delete it"
            )
        return target

    def _is_at(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                return self.key in (file.metadata() or {})
        except SafetensorError:
            return False

    def writer(
        self, target: Path, header: Mapping[str, Any], layout: Layout
    ) -> AbstractContextManager[TensorWriter]:
        """Takes the tensors of `layout` one by one; the file is at `target` in the end, or nothing.

        The same content gives the same bytes.

        Raises:
            ValueError: if the header has a number that JSON has not.
        """
        return replacing_tensors(target, layout, self._metadata(header))

    def write(self, target: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """As `writer`, of tensors that are in memory."""
        write_tensors(target, tensors, self._metadata(header))

    def _metadata(self, header: Mapping[str, Any]) -> dict[str, str]:
        versioned = {"format_version": FORMAT_VERSION, **header}
        return {self.key: json.dumps(versioned, sort_keys=True, allow_nan=False)}

    @contextmanager
    def opened(
        self,
        path_or_id: str | os.PathLike,
        argument: str,
        schema: type[Header],
        revision: str | None = None,
    ) -> Iterator[tuple[Any, Header]]:
        """The open file and its header; what the file lacks within the context is an error, too.

        Args:
            path_or_id: a file, or a folder or Hub repository with one.
            argument: by which the user gave it; the messages of errors begin with it.
            schema: what the header must be, see `validated`.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is a pickle, truncated, of another kind or of another format version,
                or its header is not of the schema.
        """
        path = resolve_file(path_or_id, self.name, argument=argument, revision=revision)
        with opened(path, argument) as file:
            text = (file.metadata() or {}).get(self.key)
            if text is None:
                raise ValueError(f"it is a safetensors file, but holds no {self.what}")
            try:
                header = parsed_json(text)
            except ValueError as error:
                raise ValueError(f"damaged header ({error}); write the file again") from error
            version = validated(header, _Versioned, _DAMAGED).format_version
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"it has format version {shortened(version)}, this peft-svdinit reads "
                    f"{FORMAT_VERSION}: upgrade peft-svdinit or write the file again"
                )
            del header["format_version"]
            yield file, validated(header, schema, _DAMAGED)


class _Versioned(msgspec.Struct):
    format_version: Any = None
