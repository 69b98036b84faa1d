"""What a user gave as a source of a delta: an adapter, a fine-tuned model, or factors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from ...files import resolve_folder
from ...models import CONFIG_NAME
from ..file import FACTORS_FILE_NAME

Kind = Literal["adapter", "factors", "model"]
_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_WANTED = (
    f"an adapter has {CONFIG_NAME}, factors are in {FACTORS_FILE_NAME}, and a fine-tuned model has "
    f"{_MODEL_CONFIG} beside its weights in safetensors"
)
_SHOWN = 6


def kind_of(path_or_id: str | os.PathLike, *, argument: str, revision: str | None = None) -> Kind:
    """What a folder or Hub repository holds, by its files; a single file can be factors only.

    Raises:
        FileNotFoundError: if there is nothing at the path, or no such repository.
        ValueError: if it holds none of the three, or more than one.
    """
    if Path(path_or_id).expanduser().is_file():
        return "factors"
    folder = resolve_folder(path_or_id, argument=argument, revision=revision)
    names = {path.name for path in folder.iterdir()}
    marks: dict[Kind, str] = {"adapter": CONFIG_NAME, "factors": FACTORS_FILE_NAME}
    found: dict[Kind, str] = {kind: mark for kind, mark in marks.items() if mark in names}
    # The configuration of a base lies beside adapters, too; its weights do not.
    if _MODEL_CONFIG in names and (not found or any(map(_MODEL_WEIGHTS.fullmatch, names))):
        found["model"] = _MODEL_CONFIG
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(
            f"{argument}: {os.fspath(path_or_id)} holds {' and '.join(found.values())}, so that it "
            f"can be read as more than one thing; {_WANTED}: give a folder with one of them"
        )
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(
        f"{argument}: {os.fspath(path_or_id)} holds {', '.join(shown) or 'nothing'}{more}, which "
        f"is no adapter, fine-tuned model or factors; {_WANTED}"
    )
