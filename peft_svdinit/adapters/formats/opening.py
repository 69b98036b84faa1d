"""From what a user names to the adapter that it holds."""

from __future__ import annotations

import os
from pathlib import Path

from ...files import is_local, refuse_pickle, resolve_folder
from ...models import CONFIG_NAME
from .peft_folder import read_peft_folder
from .single_file import read_single_file
from .stored import StoredAdapter


def open_adapter(path_or_id: str | os.PathLike) -> StoredAdapter:
    """Open a PEFT folder, an adapter file, or a Hub repository or folder that holds one.

    Raises:
        FileNotFoundError: if it does not exist, or holds no adapter.
        ValueError: if it is a pickle, is not readable, holds several files, or is of a kind that
            factored deltas do not express.
        TypeError: if it is quantised.
    """
    path = Path(path_or_id).expanduser()
    refuse_pickle(path, "adapter")
    if path.is_file():
        return read_single_file(path)
    if path.suffix == ".safetensors" and is_local(path_or_id):
        raise FileNotFoundError(f"adapter: there is no file {path}")
    folder = resolve_folder(path_or_id, argument="adapter")
    if (folder / CONFIG_NAME).is_file():
        return read_peft_folder(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        for pickle in sorted(file for file in folder.iterdir() if file.is_file()):
            refuse_pickle(pickle, "adapter")
        raise FileNotFoundError(
            f"adapter: {folder} has neither {CONFIG_NAME} nor a safetensors file"
        )
    if len(files) > 1:
        raise ValueError(
            f"adapter: {folder} holds several files ({', '.join(file.name for file in files)}); "
            "name one of them"
        )
    return read_single_file(files[0])
