"""Paths that users give to the verbs: models to read, folders to write."""

from __future__ import annotations

from pathlib import Path

from .. import training


def model_source(name: str, option: str = "base") -> str:
    """The folder of a model, by path or `builtin:` name; a Hub id is returned unchanged.

    Raises:
        ValueError, ModuleNotFoundError, TimeoutError: as `resolve_model`.
    """
    source = training.resolve_model(name, option)
    return str(Path(source).expanduser()) if source.startswith("~") else source


def refuse_file(folder: str | Path, option: str) -> None:
    """Refuse, before any work, an output folder that cannot be made for what is in its place.

    Raises:
        ValueError: if the path or one of its parents is a file, or a link that leads to itself.
    """
    path = Path(folder).expanduser()
    try:
        path.resolve()
    except (RuntimeError, OSError) as error:  # Python's words for it differ among its versions.
        raise ValueError(
            f"{option} must be a folder, but {path} cannot be followed: {error}"
        ) from error
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{option} must be a folder, but {place} is a file")
            return
