"""Opening a user's safetensors file; what is wrong with it is said by its name and its path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def opened(path: Path, argument: str) -> Iterator[Any]:
    """The open file. A ValueError within the context gets argument and path before its message.

    Args:
        path: the file.
        argument: by which the user gave it.

    Raises:
        ValueError: if the file is no safetensors file, truncated, or lacks a tensor that is read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{argument}: {path} is not a readable safetensors file ({error}): truncated while "
            "copying? Fetch or write it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from error
