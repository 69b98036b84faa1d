"""Writing files so that a kill at any moment leaves the old content or the new, never a half."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`: it becomes `path`, or on an error it is removed.

    The caller writes a file or makes a directory at the yielded path. An existing `path` is
    replaced: a file atomically; a directory, by a directory only, in two renames. A kill between
    the two leaves no `path`, but the old and the new directory, both whole, in the hidden folder
    `.{name}.{random}` beside it. Such folders of killed processes are left to the user: whether
    another process, perhaps of another machine, still writes one cannot be told.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = workspace / target.name
    aside = workspace / f"{target.name}.old"
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir() and not target.is_symlink():
            os.replace(target, aside)
        os.replace(temporary, target)
    finally:
        if aside.exists() and not os.path.lexists(target):
            os.replace(aside, target)  # Should this fail as well, the workspace stays.
        shutil.rmtree(workspace, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
