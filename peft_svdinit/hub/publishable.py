"""Files as they may be published: the base by its name on the Hub, and no path of this disk."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from ..analysis import COMPARISON_NUMBERS
from ..factors import IN_MEMORY, SIDECAR_NAME
from ..files import is_local, opened, parsed_json, read_json, write_json, write_text
from ..models import CONFIG_NAME, MODEL_CONFIG
from ..training import COMMENT
from .artefact import RECORDS
from .base_model import BaseModel

# Others are published as they are: a tokenizer's vocabulary has what looks like paths.
_CHANGED = (CONFIG_NAME, SIDECAR_NAME, COMPARISON_NUMBERS, "svd_analysis_rank*.json", *RECORDS)
# Of these, the values that transformers has for where something was loaded from.
_CONFIGS = (MODEL_CONFIG, "tokenizer_config.json")
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file")
# Absolute, of a home, or out of the working directory; neither a Hub id nor an address.
_PATH = re.compile(
    r"(?:file://)?(?<![\w./~\\])(?<!:(?=//))(?:~[\w-]*|\.\.?)?/(?!/)[^\s\"'=,;\[\]{}]+"
    r"|\b[A-Za-z]:\\[^\s\"'=,;]+"
)
_WHOLE = re.compile(r"(?:/|~|\./|\.\./|file://|[A-Za-z]:[/\\])(?!.* -)[^\n]+")
# Names and patterns of layers.
_NO_PATHS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers")
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
# Whether they are there or not, these are no ids of the Hub.
_DATA = (".csv", ".json", ".jsonl", ".parquet", ".txt")
_MODEL_OPTION = "--model_name_or_path"


def without_paths(value: Any, base: BaseModel) -> Any:
    """JSON in which the base has its name on the Hub, and of other paths the last part is left."""
    if isinstance(value, dict):
        return {key: _of_key(key, entry, base) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry, base) for entry in value]
    if not isinstance(value, str):
        return value
    if value == base.recorded:
        return base.name
    if _WHOLE.fullmatch(value):
        return _last_part(value)
    return _PATH.sub(lambda found: _last_part(found[0]), value)


def _of_key(key: str, value: Any, base: BaseModel) -> Any:
    if key in _NO_PATHS:
        return value
    if key == "command" and isinstance(value, str):
        return command_without_paths(value, base)[0]
    return without_paths(value, base)


def _last_part(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name


def command_without_paths(command: str, base: BaseModel) -> tuple[str, list[str]]:
    """As `without_paths`, of a command; and the names of files that it reads from this disk."""
    words, read, option = [], [], ""
    command, mark, comment = _without_comment(command)
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if not equals and word.startswith("--"):
            words.append(word)
            continue
        public = without_paths(value, base)
        if option == _MODEL_OPTION and (is_local(value) or value == base.recorded):
            public = base.name
        is_file = is_local(value) or Path(value).suffix in _DATA
        if is_file and option not in ("", "--output_dir") and public != base.name:
            read.append(public)
        words.append(f"{option}={public}" if equals else public)
    return shlex.join(words) + mark + without_paths(comment, base), read


def _without_comment(command: str) -> tuple[str, str, str]:
    """A command, and the comment that `invocation` put behind it; an argument may hold a mark."""
    before, mark, comment = command.rpartition(COMMENT)
    if not mark:
        return command, "", ""
    try:
        shlex.split(before)
    except ValueError:
        return command, "", ""
    return before, mark, comment


def publish_file(source: Path, target: Path, base: BaseModel) -> None:
    """Put `source` at `target`: as it is where it names no path of this disk, else changed.

    Raises:
        ValueError: if it is damaged.
    """
    if any(fnmatchcase(source.name, pattern) for pattern in _CHANGED) and source.suffix == ".json":
        value = read_json(source, "folder")
        changed = without_paths(value, base)
        if source.name == SIDECAR_NAME and value.get("svd_factors"):
            # These are not published; the weights that came of them are.
            changed["svd_factors"] = IN_MEMORY
        if changed != value:
            write_json(target, changed)
            return
    elif source.name in _CONFIGS:
        value = read_json(source, "folder", constants=True)
        origins = {key: value[key] for key in _ORIGINS if value.get(key)}
        changed = without_paths(origins, base)
        if changed != origins:
            # Infinities stay, which transformers writes and JSON has not.
            write_text(target, json.dumps({**value, **changed}, indent=2) + "\n")
            return
    elif source.suffix == ".safetensors":
        with opened(source, "folder") as file:
            metadata = file.metadata() or {}
        changed = {key: _changed(text, base) for key, text in metadata.items()}
        if changed != metadata:
            _copy_with_metadata(source, target, changed)
            return
    os.symlink(source.resolve(), target)


def _changed(text: str, base: BaseModel) -> str:
    try:
        value = parsed_json(text)
    except ValueError:
        return without_paths(text, base)
    changed = without_paths(value, base)
    return text if changed == value else json.dumps(changed, sort_keys=True)


def _copy_with_metadata(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """The same tensors, byte by byte, under another header."""
    with open(source, "rb") as file, open(target, "wb") as copy:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = {**parsed_json(file.read(length)), "__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        copy.write(_LENGTH.pack(len(text)))
        copy.write(text)
        shutil.copyfileobj(file, copy, 1 << 24)
