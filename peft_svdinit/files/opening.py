"""Opening a user's safetensors file; what is wrong with it is said by its name and its path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .tensor_writer import FLOAT_DTYPES
from .wrong_kind import WrongKind


@contextmanager
def opened(path: Path, argument: str) -> Iterator[Any]:
    """The open file. A wrong input within the context gets argument and path before its message.

    Args:
        path: the file.
        argument: by which the user gave it.

    Raises:
        ValueError: if the file is no safetensors file, truncated, or lacks a tensor that is read.
        TypeError: a `WrongKind` within the context.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{argument}: {path} is not a readable safetensors file ({error}): truncated while "
            "copying? Fetch or write it again"
        ) from error
    except (ValueError, WrongKind) as error:
        kind = WrongKind if isinstance(error, WrongKind) else ValueError
        raise kind(f"{argument}: {path}: {error}") from error


def refuse_non_floats(file: Any, keys: Iterable[str]) -> None:
    """Raise TypeError if a tensor of weights is quantised, or holds no floating-point numbers.

    Args:
        file: as `opened` gives it.
        keys: of the tensors.

    Raises:
        TypeError: naming the tensor and its dtype.
    """
    for key in keys:
        refuse_non_float(key, file.get_slice(key).get_dtype())


def refuse_non_float(what: str, dtype: str) -> None:
    """As `refuse_non_floats`, of one dtype as the format spells it."""
    if dtype not in FLOAT_DTYPES:
        raise WrongKind(
            f"{what} is stored as {dtype}, and must be in {', '.join(FLOAT_DTYPES)}: dequantise it "
            "first"
        )
