"""Files as they may be published: the base by its name on the Hub, and no path of this disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..factors import IN_MEMORY, SIDECAR_NAME
from ..files import is_local, write_json
from .base_model import BaseModel

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
# Whether they are there or not, these are no ids of the Hub.
_DATA = (".csv", ".json", ".jsonl", ".parquet", ".txt")


def without_paths(value: Any, base: BaseModel) -> Any:
    """JSON in which the base has its name on the Hub, and other absolute paths their last part."""
    if isinstance(value, dict):
        return {key: without_paths(entry, base) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry, base) for entry in value]
    if not isinstance(value, str):
        return value
    if value == base.recorded:
        return base.name
    is_path = os.path.isabs(value) or value.startswith("~")
    return Path(value).name or value if is_path else value


def command_without_paths(command: str, base: BaseModel) -> tuple[str, list[str]]:
    """As `without_paths`, of a command; and the names of files that it reads from this disk."""
    words, read, option = [], [], ""
    for word in shlex.split(command):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
        else:
            equals, value = "", word
        public = without_paths(value, base)
        is_file = is_local(value) or Path(value).suffix in _DATA
        if is_file and value and option not in ("", "--output_dir") and public != base.name:
            read.append(public)
        words.append(f"{option}={public}" if equals else public or option)
    return shlex.join(words), read


def publish_file(source: Path, target: Path, base: BaseModel) -> None:
    """Put `source` at `target`: as it is where it names no path of this disk, else changed."""
    if source.suffix == ".json":
        value = json.loads(source.read_text(encoding="utf-8"))
        changed = without_paths(value, base)
        if source.name == SIDECAR_NAME and is_local(value.get("svd_factors") or ""):
            # These are not published; the weights that came of them are.
            changed["svd_factors"] = IN_MEMORY
        if changed != value:
            write_json(target, changed)
            return
    elif source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
        changed = {key: _changed(text, base) for key, text in metadata.items()}
        if changed != metadata:
            _copy_with_metadata(source, target, changed)
            return
    os.symlink(source.resolve(), target)


def _changed(text: str, base: BaseModel) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return without_paths(text, base)
    changed = without_paths(value, base)
    return text if changed == value else json.dumps(changed, sort_keys=True)


def _copy_with_metadata(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """The same tensors, byte by byte, under another header."""
    with open(source, "rb") as file, open(target, "wb") as copy:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = {**json.loads(file.read(length)), "__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        copy.write(_LENGTH.pack(len(text)))
        copy.write(text)
        shutil.copyfileobj(file, copy, 1 << 24)
