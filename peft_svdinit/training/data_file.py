"""What is wrong with a file of examples that could not be loaded, by the line where it is."""

from __future__ import annotations

import json
from pathlib import Path

_TEXT = (".json", ".jsonl", ".csv", ".txt")
_JSON = (".json", ".jsonl")


def fault_in_file(path: Path) -> str | None:
    """A sentence about the first line at fault, None where none is found.

    Found are files without examples, text that is not UTF-8, and lines that are no JSON.

    Raises:
        OSError: if the file cannot be read.
    """
    if not path.stat().st_size:
        return "the file is empty"
    if path.suffix not in _TEXT:
        return None
    rows = False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} is no text in UTF-8: {error}"
            if path.suffix in _JSON and text.strip():
                fault = _fault_of_row(text)
                if fault and not rows:
                    return _fault_of_document(path)
                if fault:
                    return f"line {number} is no JSON: {fault}"
            rows = rows or bool(text.strip())
    return None if rows else "the file has no examples"


def _fault_of_row(line: str) -> str | None:
    try:
        json.loads(line)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return str(error)
    return None


def _fault_of_document(path: Path) -> str | None:
    """Of JSON whose first line alone is none: a list over several lines, or a broken file."""
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"it is no JSON: {error}"
    return None
