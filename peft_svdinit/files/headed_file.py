"""A safetensors file whose header's one metadata entry is JSON: how masks and scores are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import replacing
from .tensor_writer import TensorWriter

FORMAT_VERSION = 1


def write_headed(
    target: Path, key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors with `header` and the format version as the metadata entry `key`, atomically.

    The same content gives the same bytes.

    Raises:
        ValueError: if the header has a number that JSON has not.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    versioned = {"format_version": FORMAT_VERSION, **header}
    entry = json.dumps(versioned, sort_keys=True, allow_nan=False)
    with replacing(target) as temporary, TensorWriter(temporary, layout, {key: entry}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@contextmanager
def opened_headed(path: Path, key: str, lacking: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its header; what the header lacks within the context is an error, too.

    Args:
        lacking: what to say of a file without `key`: that it holds "no …".

    Raises:
        ValueError: if the file is truncated, has no such header or a damaged one, or is of another
            format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
            if text is None:
                raise ValueError(f"{path} is a safetensors file, but holds {lacking}")
            header = json.loads(text)
            version = header.get("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {version}, this peft-svdinit reads "
                    f"{FORMAT_VERSION}: upgrade peft-svdinit or write the file again"
                )
            yield file, header
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): truncated while copying? Fetch "
            "or write it again"
        ) from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged header ({error!r}); write it again") from error


def checked_fields(
    path: Path, header: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """The entries named by `kinds`.

    Raises:
        KeyError: if the header lacks one.
        ValueError: if one is of another type.
    """
    fields = {key: header[key] for key in kinds}
    for key, value in fields.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{path} has a damaged header: {key} is {value!r}")
    return fields
