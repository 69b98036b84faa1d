"""JSON documents in which every key in turn has values that nobody means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

# As a file spells them: what Python's parser takes beyond JSON among them.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "text": '"text"',
    "empty text": '""',
    "minus one": "-1",
    "zero": "0",
    "8.5": "8.5",
    "a thousand million": "1000000000",
    "10^400": "1" + "0" * 400,
    "1e400": "1e400",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "empty list": "[]",
    "empty object": "{}",
    "list of a number": "[1]",
    "nested objects": '{"a": {"b": [1, {"c": null}]}}',
    "broken expression": '"(("',
    "catastrophic expression": '"(a+)+$"',
    "object of an expression": '{"(.*)*x": 4}',
    "path": '"../../../etc/passwd"',
}
_DEEP = 100_000
_MARK = "here stands the value"


def documents(text: str) -> Iterator[tuple[str, bytes]]:
    """What was done to a JSON object, and its bytes then."""
    for path in _paths(json.loads(text)):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        for what, value in VALUES.items():
            content = json.dumps(_replaced(text, path, _MARK)).replace(f'"{_MARK}"', value)
            yield f"{name[1:]} = {what}", content.encode()
        yield f"{name[1:]} is missing", json.dumps(_replaced(text, path, None)).encode()
    first = next(iter(json.loads(text)))
    body = text.strip()[1:]
    yield "duplicate key", f'{{"{first}": 1, {body}'.encode()
    yield "deep", f'{{"deep": {"[" * _DEEP}{"]" * _DEEP}, {body}'.encode()
    yield "byte order mark", b"\xef\xbb\xbf" + text.encode()
    yield "Latin-1", f'{{"caf\u00e9": 1, {body}'.encode("latin-1")
    yield "UTF-16", text.encode("utf-16")
    yield "a list", f"[{text}]".encode()
    yield "null", b"null"
    yield "nothing", b""
    yield "half", text[: len(text) // 2].encode()


def _paths(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Of all entries of objects, and of the first of every list."""
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = list(enumerate(value))[:1]
    for key, entry in entries:
        yield (*above, key)
        yield from _paths(entry, (*above, key))


def _replaced(text: str, path: tuple[str | int, ...], value: Any) -> Any:
    """The document with another value at a path; without it if that is None."""
    document = json.loads(text)
    *above, last = path
    place = document
    for part in above:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


def document_of(path: Path) -> str:
    """The JSON of a file: its content, or the longest entry of a safetensors header."""
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return max(metadata.values(), key=len)


def replace_document(path: Path, content: bytes) -> bool:
    """Put other bytes in its place; False if a safetensors header cannot hold them."""
    if path.suffix != ".safetensors":
        path.write_bytes(content)
        return True
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    key = max(metadata, key=lambda key: len(metadata[key]))
    save_file(load_file(path), path, {**metadata, key: text})
    return True
