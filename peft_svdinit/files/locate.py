"""Finding the files of users: a file, a folder, or a repository of the Hub; never a pickle."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from .hub import ask_hub, split_revision

logger = logging.getLogger(__name__)

_PICKLE_SUFFIXES = {".bin", ".pth", ".pt", ".pkl", ".ckpt"}
# Of a repository: configurations, weights and tokenizers; not the weights in further formats.
_READ = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model"]
_NOT_READ = ["consolidated*.safetensors", "original/*", "onnx/*"]


def refuse_pickle(path: Path, argument: str) -> None:
    """Raise ValueError with the conversion command if `path` looks like a pickle."""
    if path.suffix in _PICKLE_SUFFIXES:
        raise ValueError(
            f"{argument} must be safetensors, got {path}: a pickle can run code when it is "
            'loaded. If you trust it, convert it once: python -c "import torch; from '
            "safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in "
            f"torch.load('{path}', weights_only=True).items()}}, "
            f"'{path.with_suffix('.safetensors')}')\""
        )


def is_local(path_or_id: str | os.PathLike) -> bool:
    """Whether the user means the disk: an existing path, or a spelling that no Hub id has."""
    text = os.fspath(path_or_id)
    name, _ = split_revision(text)
    return (
        os.path.exists(text)
        or os.path.isabs(text)
        or text.startswith((".", "~"))
        or name.count("/") > 1
        or Path(text).suffix in {".safetensors", ".json", *_PICKLE_SUFFIXES}
    )


def hub_id(
    path_or_id: str | os.PathLike, revision: str | None, argument: str
) -> tuple[str, str | None]:
    """A repository and its revision, which the id itself may name: `user/name@revision`.

    Raises:
        ValueError: if both name one, and not the same.
    """
    name, named = split_revision(path_or_id)
    if named and revision not in (None, named):
        raise ValueError(
            f"{argument}: {os.fspath(path_or_id)!r} names another revision than {revision!r}, "
            "which is given beside it; leave one out"
        )
    return name, named or revision


def resolve_file(
    path_or_id: str | os.PathLike, file_name: str, *, argument: str, revision: str | None = None
) -> Path:
    """The local path of `file_name` in a folder or Hub repository, or of the file named itself.

    Raises:
        FileNotFoundError: if it does not exist on the disk or the Hub.
        PermissionError, ConnectionError: as `ask_hub`.
        ValueError: if it is a pickle, or a local path has a revision.
    """
    path = Path(path_or_id).expanduser()
    refuse_pickle(path, argument)
    _refuse_local_revision(path_or_id, argument, revision)
    if path.is_file():
        return path
    if path.is_dir():
        found = path / file_name
        if found.is_file():
            return found
        if found.with_suffix(".bin").is_file():
            refuse_pickle(found.with_suffix(".bin"), argument)
        raise FileNotFoundError(f"{argument}: the folder {path} has no {file_name}")
    if is_local(path_or_id):
        raise FileNotFoundError(f"{argument}: there is no file or folder {path}")
    return fetched_file(path_or_id, file_name, argument=argument, revision=revision)


def fetched_file(
    repository: str | os.PathLike,
    file_name: str,
    *,
    argument: str,
    revision: str | None = None,
    **download: Any,
) -> Path:
    """A file of a repository of the Hub, in the cache.

    Args:
        repository: its id, `user/name` or `user/name@revision`.
        file_name: the file.
        argument: by which the user gave the id; the messages of errors begin with it.
        revision: branch, tag or commit.
        download: further arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `ask_hub`; pickles that
            the repository has in place of the file are named.
    """
    name, revision = hub_id(repository, revision, argument)
    try:
        found = ask_hub(
            lambda: hf_hub_download(name, file_name, revision=revision, **download),
            os.fspath(repository),
            argument=argument,
            what=file_name,
        )
    except FileNotFoundError as error:
        pickles = hub_pickles(name, revision) if file_name.endswith(".safetensors") else []
        if not pickles:
            raise
        raise FileNotFoundError(
            f"{error}, but {', '.join(pickles[:3])}: a pickle can run code when it is loaded; ask "
            "its author for safetensors, or convert it with what you trust"
        ) from error
    return Path(str(found))


def resolve_folder(
    path_or_id: str | os.PathLike, *, argument: str, revision: str | None = None
) -> Path:
    """The local folder of a model or adapter: itself, or a snapshot of what is read of it.

    Raises:
        FileNotFoundError: if it does not exist on the disk or the Hub.
        PermissionError, ConnectionError: as `ask_hub`.
        ValueError: if a local path has a revision.
    """
    path = Path(path_or_id).expanduser()
    _refuse_local_revision(path_or_id, argument, revision)
    if path.is_dir():
        return path
    if is_local(path_or_id):
        raise FileNotFoundError(f"{argument}: {path} is not a folder on this disk")
    name, revision = hub_id(path_or_id, revision, argument)
    found = ask_hub(
        lambda: snapshot_download(
            name, revision=revision, allow_patterns=_READ, ignore_patterns=_NOT_READ
        ),
        os.fspath(path_or_id),
        argument=argument,
    )
    return Path(found)


def hub_pickles(path_or_id: str | os.PathLike, revision: str | None = None) -> list[str]:
    """The pickles in a repository of the Hub, which `resolve_folder` does not fetch.

    None of a local path, and none if the Hub does not answer: this is for an error's text.
    """
    if is_local(path_or_id):
        return []
    name, named = split_revision(path_or_id)
    try:
        files = HfApi().list_repo_files(name, revision=named or revision)
    except Exception as error:  # Of the HTTP client, which differs among versions.
        logger.info("The files of %s cannot be listed: %s", os.fspath(path_or_id), error)
        return []
    return [name for name in files if PurePosixPath(name).suffix in _PICKLE_SUFFIXES]


def _refuse_local_revision(
    path_or_id: str | os.PathLike, argument: str, revision: str | None
) -> None:
    if revision is not None and is_local(Path(path_or_id).expanduser()):
        raise ValueError(
            f"{argument}: a revision belongs to a repository of the Hub, got {revision!r} for the "
            f"path {os.fspath(path_or_id)}; leave the revision out"
        )


def inside(folder: Path, name: str, argument: str) -> Path:
    """`folder / name`, refused if `name` (read from somebody's file) leads out of the folder.

    Raises:
        ValueError: if `name` is absolute or climbs.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise ValueError(
            f"{argument}: {folder}: refusing the file name {name!r}, which leads out of the folder"
        )
    return folder / name


def file_stamps(path_or_id: str | os.PathLike) -> dict[str, list[int]] | None:
    """Size and time of change of a path's files, by which a change is noticed; None of a Hub id."""
    path = Path(path_or_id).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
