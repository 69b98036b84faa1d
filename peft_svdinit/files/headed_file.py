"""Safetensors files whose header's one metadata entry is JSON: factors, masks, scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .locate import resolve_file
from .opening import opened
from .tensor_writer import Layout, TensorWriter, replacing_tensors, write_tensors

FORMAT_VERSION = 1


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
        self, path_or_id: str | os.PathLike, argument: str, revision: str | None = None
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The open file and its header; what either lacks within the context is an error, too.

        Args:
            path_or_id: a file, or a folder or Hub repository with one.
            argument: by which the user gave it; the messages of errors begin with it.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is a pickle, truncated, of another kind or of another format version.
        """
        path = resolve_file(path_or_id, self.name, argument=argument, revision=revision)
        with opened(path, argument) as file:
            text = (file.metadata() or {}).get(self.key)
            if text is None:
                raise ValueError(f"it is a safetensors file, but holds no {self.what}")
            try:
                header = json.loads(text)
                version = header.pop("format_version", None)
                if version != FORMAT_VERSION:
                    raise ValueError(
                        f"it has format version {version}, this peft-svdinit reads "
                        f"{FORMAT_VERSION}: upgrade peft-svdinit or write the file again"
                    )
                yield file, header
            except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"damaged header ({error!r}); write the file again") from error


def checked_fields(
    header: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """The entries named by `kinds`.

    Raises:
        KeyError: if the header lacks one.
        ValueError: if one is of another type.
    """
    fields = {key: header[key] for key in kinds}
    for key, value in fields.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"damaged header: {key} is {value!r}; write the file again")
    return fields
