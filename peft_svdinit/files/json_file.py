"""Files of JSON objects: configurations, records and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_text import parsed_json
from .schema import validated


def read_json(
    path: Path, argument: str, schema: type | None = None, *, constants: bool = False
) -> dict[str, Any]:
    """The object in a JSON file, untouched.

    Args:
        path: the file.
        argument: by which the user gave it; the messages of errors begin with it.
        schema: what its entries must be, see `validated`; others may be anything.
        constants: whether NaN and infinities are taken, see `parsed_json`.

    Raises:
        ValueError: if it is no JSON as `parsed_json` takes it, no object, or not of the schema.
    """
    try:
        value = parsed_json(path.read_bytes(), constants=constants)
    except ValueError as error:
        raise ValueError(
            f"{argument}: {path} is not readable JSON ({error}): truncated or edited? Fetch it "
            "again, or correct it"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{argument}: {path} must hold a JSON object, got {type(value).__name__}")
    if schema is not None:
        validated(value, schema, f"{argument}: {path}: ")
    return value
